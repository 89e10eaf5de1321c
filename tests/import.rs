//! Images from a server and from the import directory, through the mounted tree.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use support::{Daemon, errno, wait_until};
use tempfile::TempDir;
use uuid::Uuid;

const BYTES: usize = 1 << 20;
const MOST_BYTES: usize = 4 << 20;

fn image() -> Vec<u8> {
    (0..BYTES as u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

/// A small http server. What it answers depends on the path.
struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// `/slow` gives the rest.
    released: AtomicBool,
    /// The test is over.
    ended: AtomicBool,
    slow_requests: AtomicUsize,
}

impl Server {
    fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if of_thread.ended.load(Ordering::SeqCst) {
                    return;
                }
                let shared = of_thread.clone();
                // Who hangs up early is what some of the tests are about.
                thread::spawn(move || drop(serve(stream, address, &shared)));
            }
        });
        Server { address, shared }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        let _wakes_the_listener = TcpStream::connect(self.address);
    }
}

fn serve(mut stream: TcpStream, address: SocketAddr, shared: &Shared) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
    let path = request.split(' ').nth(1).unwrap_or_default();
    let image = image();
    let sized = |length: usize| format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
    let redirect = |to: &str| format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n");
    match path {
        "/image" => {
            stream.write_all(sized(BYTES).as_bytes())?;
            stream.write_all(&image)
        }
        "/unsized" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            stream.write_all(&image)
        }
        "/moved" => stream.write_all(redirect("/image").as_bytes()),
        "/loop" => stream.write_all(redirect("/loop").as_bytes()),
        "/to-metadata" => stream.write_all(redirect("http://169.254.169.254/latest/").as_bytes()),
        "/to-localhost" => stream.write_all(redirect(&format!("http://localhost:{}/image", address.port())).as_bytes()),
        "/to-credentials" => stream.write_all(redirect(&format!("http://a:b@{address}/image")).as_bytes()),
        "/to-file" => stream.write_all(redirect("file:///etc/passwd").as_bytes()),
        "/large" => stream.write_all(sized(MOST_BYTES + 1).as_bytes()),
        "/endless" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            loop {
                stream.write_all(&image)?;
            }
        }
        "/stall" => {
            stream.write_all(sized(BYTES).as_bytes())?;
            stream.write_all(&image[..BYTES / 2])?;
            // Until the other side has had enough.
            stream.read(&mut [0]).map(drop)
        }
        "/short" => {
            stream.write_all(sized(BYTES).as_bytes())?;
            stream.write_all(&image[..BYTES / 2])
        }
        "/slow" => {
            shared.slow_requests.fetch_add(1, Ordering::SeqCst);
            stream.write_all(sized(BYTES).as_bytes())?;
            let (most, rest) = image.split_at(BYTES / 2);
            stream.write_all(most)?;
            let mut trickle = rest.chunks(64);
            while !shared.released.load(Ordering::SeqCst) && !shared.ended.load(Ordering::SeqCst) {
                stream.write_all(trickle.next().unwrap_or_default())?;
                thread::sleep(Duration::from_millis(50));
            }
            trickle.try_for_each(|chunk| stream.write_all(chunk))
        }
        _ => stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
    }
}

/// A daemon that may ask 127.0.0.1, and its configuration.
fn daemon(more: &[&str]) -> (Daemon, TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("instancefs.toml");
    let text = format!(
        "import_hosts = ['127.0.0.1']\nimport_max_bytes = {MOST_BYTES}\nimport_stall_timeout = '1s'\nsettle = '20s'\n"
    );
    fs::write(&path, text).expect("written");
    let options = [&["--config", path.to_str().expect("UTF-8")], more].concat();
    (Daemon::start(&options), directory)
}

fn draft(daemon: &Daemon, source: &str) -> Uuid {
    let id = Uuid::new_v4();
    fs::create_dir(daemon.path(format!("images/{id}"))).expect("a draft");
    daemon.set(format!("images/{id}/import_from"), source);
    id
}

fn commit(daemon: &Daemon, id: Uuid) -> i32 {
    errno(daemon.write(format!("images/{id}/state"), "active"))
}

#[track_caller]
fn assert_imported(daemon: &Daemon, id: Uuid) {
    assert_eq!(daemon.read(format!("images/{id}/state")), "active");
    assert!(fs::read(daemon.path(format!("images/{id}/data"))).expect("readable") == image());
    let path = daemon.state_directory().join(format!("images/{id}/data"));
    let sum = Command::new("sha512sum").arg(path).output().expect("sha512sum runs").stdout;
    let sum = String::from_utf8(sum).expect("text");
    assert!(sum.starts_with(&daemon.read(format!("images/{id}/sha512"))), "{sum}");
    assert_eq!(daemon.read(format!("images/{id}/disk_format")), "raw");
}

#[track_caller]
fn assert_refused(daemon: &Daemon, source: &str, wanted: i32, reason: &str) {
    let id = draft(daemon, source);
    let refused = commit(daemon, id);
    let last = daemon.read(format!("images/{id}/last_error"));
    assert_eq!(refused, wanted, "{source}: {last}");
    assert!(last.contains(reason), "{source}: {last}");
    assert_eq!(daemon.read(format!("images/{id}/state")), "draft", "{source}");
    assert_eq!(daemon.read(format!("images/{id}/task")), "", "{source}");
    let data = daemon.path(format!("images/{id}/data"));
    assert!(fs::read(&data).expect("readable").is_empty(), "{source}: nothing of it stays");
    // It can still be filled by hand.
    daemon.set(format!("images/{id}/import_from"), "\n");
    fs::write(&data, image()).expect("written");
    assert_eq!(commit(daemon, id), 0, "{source}: {}", daemon.read(format!("images/{id}/last_error")));
    assert_imported(daemon, id);
}

#[test]
fn an_image_comes_from_a_server_with_and_without_a_length_and_by_a_redirect() {
    let server = Server::start();
    let (daemon, _config) = daemon(&[]);
    for path in ["/image", "/unsized", "/moved"] {
        let id = draft(&daemon, &server.url(path));
        assert_eq!(commit(&daemon, id), 0, "{path}: {}", daemon.read(format!("images/{id}/last_error")));
        assert_imported(&daemon, id);
    }
}

#[test]
fn what_a_server_does_wrong_leaves_an_empty_draft_and_the_reason() {
    let server = Server::start();
    let (daemon, _config) = daemon(&[]);
    for (path, wanted, reason) in [
        ("/loop", libc::EINVAL, "redirects more than"),
        ("/to-metadata", libc::EPERM, "169.254.169.254 is not public"),
        ("/to-localhost", libc::EPERM, "host localhost is not allowed"),
        ("/to-credentials", libc::EINVAL, "password"),
        // A path of that server, whatever it looks like.
        ("/to-file", libc::EIO, "status 404"),
        ("/large", libc::EINVAL, "larger than"),
        ("/endless", libc::EINVAL, "larger than"),
        ("/stall", libc::ETIMEDOUT, "silent"),
        ("/short", libc::EIO, "524288 of 1048576"),
        ("/missing", libc::EIO, "status 404"),
    ] {
        assert_refused(&daemon, &server.url(path), wanted, reason);
    }
    let closed = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    assert_refused(&daemon, &format!("http://{closed}/"), libc::EIO, "refused");
}

#[test]
fn without_a_word_from_an_administrator_no_address_of_the_host_or_its_networks_is_asked() {
    let server = Server::start();
    let port = server.address.port();
    let daemon = Daemon::start(&["-o", "settle=20s"]);
    for host in
        ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254"]
    {
        assert_refused(&daemon, &format!("http://{host}:{port}/image"), libc::EPERM, "is not allowed");
    }
    for (source, reason) in [
        (format!("http://user:word@127.0.0.1:{port}/image"), "password"),
        ("ftp://127.0.0.1/image".to_owned(), "only http"),
        ("file:///etc/passwd".to_owned(), "only http"),
        ("http://".to_owned(), "no URL"),
    ] {
        assert_refused(&daemon, &source, libc::EINVAL, reason);
    }
}

#[test]
fn a_slow_import_shows_its_progress_and_goes_on_after_kill_9() {
    let server = Server::start();
    let (mut daemon, _config) = daemon(&["-o", "settle=0s"]);
    let id = draft(&daemon, &server.url("/slow"));
    daemon.set(format!("images/{id}/state"), "active");
    let progress = |daemon: &Daemon| {
        let task = daemon.read(format!("images/{id}/task"));
        let progress = daemon.read(format!("images/{id}/progress"));
        assert!(task == "importing" && daemon.read(format!("images/{id}/state")) == "draft", "{task}");
        progress.parse::<u32>().expect("a number")
    };
    wait_until("half of it is there", || (40..100).contains(&progress(&daemon)));
    assert_eq!(daemon.read(format!("images/{id}/state_available")), "", "nothing else can be asked meanwhile");
    assert_ne!(errno(fs::write(daemon.path(format!("images/{id}/data")), b"mine")), 0, "nobody else writes");
    daemon.kill();
    daemon.spawn();
    wait_until("it is fetched again", || server.shared.slow_requests.load(Ordering::SeqCst) == 2);
    wait_until("half of it is there again", || (40..100).contains(&progress(&daemon)));
    server.shared.released.store(true, Ordering::SeqCst);
    wait_until("it is active", || daemon.read(format!("images/{id}/state")) == "active");
    assert_imported(&daemon, id);
}

#[test]
fn a_draft_that_has_data_is_not_imported_over() {
    let server = Server::start();
    let (daemon, _config) = daemon(&[]);
    let id = draft(&daemon, &server.url("/image"));
    let data = daemon.path(format!("images/{id}/data"));
    fs::write(&data, b"precious").expect("written");
    assert_eq!(commit(&daemon, id), libc::EINVAL);
    let last = daemon.read(format!("images/{id}/last_error"));
    assert!(last.contains("has data and import_from"), "{last}");
    assert_eq!(fs::read(&data).expect("readable"), b"precious");
}

#[test]
fn a_file_comes_from_the_import_directory_and_from_nowhere_else() {
    let (daemon, _config) = daemon(&[]);
    let directory = daemon.state_directory().join("import");
    fs::create_dir(directory.join("sub")).expect("a directory");
    fs::write(directory.join("sub/image"), image()).expect("written");
    symlink("sub/image", directory.join("inside")).expect("a symlink");
    for source in ["sub/image", "inside", "sub/../inside", directory.join("sub/image").to_str().expect("UTF-8")] {
        let id = draft(&daemon, source);
        assert_eq!(commit(&daemon, id), 0, "{source}: {}", daemon.read(format!("images/{id}/last_error")));
        assert_imported(&daemon, id);
    }
    let secret = daemon.scratch().join("secret");
    fs::write(&secret, image()).expect("written");
    symlink(&secret, directory.join("absolute")).expect("a symlink");
    symlink("../../secret", directory.join("relative")).expect("a symlink");
    symlink("/", directory.join("root")).expect("a symlink");
    symlink("/proc/self/fd/0", directory.join("magic")).expect("a symlink");
    mknod(&directory.join("fifo"), SFlag::S_IFIFO, Mode::S_IRWXU, 0).expect("a FIFO");
    mknod(&directory.join("device"), SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 5)).expect("a device");
    fs::File::create(directory.join("large")).and_then(|file| file.set_len(MOST_BYTES as u64 + 1)).expect("a file");
    for (source, reason) in [
        ("absolute", "out of the import directory"),
        ("relative", "out of the import directory"),
        ("root/etc/passwd", "out of the import directory"),
        ("magic", "out of the import directory"),
        ("../../secret", "out of the import directory"),
        ("sub/../../../secret", "out of the import directory"),
        ("/etc/passwd", "below the import directory"),
        (secret.to_str().expect("UTF-8"), "below the import directory"),
        ("json:{}", "no such file"),
        ("missing", "no such file"),
        ("sub", "not a regular file"),
        ("fifo", "not a regular file"),
        ("device", "not a regular file"),
        ("large", "larger than"),
    ] {
        assert_refused(&daemon, source, libc::EINVAL, reason);
    }
}

#[test]
fn a_hostile_image_is_refused_when_it_is_imported_too() {
    let (daemon, _config) = daemon(&[]);
    let path = daemon.state_directory().join("import/image.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow"])
        .args([path.as_os_str(), "1M".as_ref()])
        .status();
    assert!(made.expect("qemu-img runs").success());
    assert_refused(&daemon, "image.qcow2", libc::EINVAL, "backing file");
    assert!(path.exists(), "the import directory is the administrator's");
}

/// openssl's own https server, with a certificate of an authority that no host trusts.
struct Tls(Child);

impl Tls {
    /// Serves `directory/image`; the authority's certificate is `directory/authority`.
    fn start(directory: &Path) -> (Tls, u16) {
        let file = |name: &str| directory.join(name).to_str().expect("UTF-8").to_owned();
        let request = |subject: &str, name: &str, more: &[&str]| {
            let made = Command::new("openssl")
                .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", subject, "-days", "2"])
                .args(["-keyout", &file(&format!("{name}.key")), "-out", &file(name)])
                .args(more)
                .stderr(Stdio::null())
                .status();
            assert!(made.expect("openssl runs").success());
        };
        request("/CN=authority", "authority", &[]);
        let signed = ["-CA", &file("authority"), "-CAkey", &file("authority.key")];
        let leaf = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=IP:127.0.0.1"];
        request("/CN=127.0.0.1", "server", &[signed, leaf].concat());
        let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\n\r\n").into_bytes();
        answer.extend(image());
        fs::write(directory.join("image"), answer).expect("written");
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
        let server = Command::new("openssl")
            .args(["s_server", "-HTTP", "-quiet", "-accept", &format!("127.0.0.1:{port}")])
            .args(["-key", &file("server.key"), "-cert", &file("server")])
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let server = Tls(server.expect("openssl runs"));
        wait_until("the server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        (server, port)
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("reaped");
    }
}

#[test]
fn a_certificate_that_nobody_trusts_is_refused() {
    let (daemon, config) = daemon(&[]);
    let (_server, port) = Tls::start(config.path());
    assert_refused(&daemon, &format!("https://127.0.0.1:{port}/image"), libc::EIO, "certificate");
}

#[test]
fn an_image_comes_by_https_from_a_server_that_the_host_trusts() {
    let (mut daemon, config) = daemon(&[]);
    let (_server, port) = Tls::start(config.path());
    daemon.stop();
    daemon.spawn_with(&[("SSL_CERT_FILE", config.path().join("authority").to_str().expect("UTF-8"))]);
    let id = draft(&daemon, &format!("https://127.0.0.1:{port}/image"));
    assert_eq!(commit(&daemon, id), 0, "{}", daemon.read(format!("images/{id}/last_error")));
    assert_imported(&daemon, id);
}
