//! The texts of the manual pages.

/// What a page says besides its synopsis and options.
pub struct Page {
    /// `instancefs` or `instancefs-<subcommand>`; the file's name without its section.
    pub name: &'static str,
    /// Paragraphs.
    pub description: &'static [&'static str],
    /// Codes and their meanings.
    pub exit: &'static [(&'static str, &'static str)],
    /// Variables.
    pub environment: &'static [(&'static str, &'static str)],
    /// Paths.
    pub files: &'static [(&'static str, &'static str)],
    /// What is wanted, and the lines to type.
    pub examples: &'static [(&'static str, &'static str)],
    /// Other pages.
    pub see: &'static [&'static str],
}

const CONFIGURATION: (&str, &str) = (
    "/etc/instancefs.toml",
    "Configuration; may be absent. The package installs it with every key and its default, commented out. The command \
     line wins over mount options (-o), and these win over the file. An ordinary user's is \
     ~/.config/instancefs.toml.",
);
const STATE: (&str, &str) = (
    "/var/lib/instancefs",
    "The state directory: records, disks, images, events. It belongs to one connection and one host, which its first \
     mount records. An ordinary user's is ~/.local/state/instancefs.",
);
const ACCELERATOR: (&str, &str) =
    ("INSTANCEFS_ACCELERATOR", "kvm or tcg: what new guests run on, instead of what a trial boot found out.");
const DONE: (&str, &str) = ("0", "Done.");
const FAILED: (&str, &str) = ("1", "Failed; standard error says why, in one line.");
const USAGE: (&str, &str) = ("2", "The command line cannot be understood.");

/// The pages of section 1.
pub const PAGES: &[Page] = &[
    Page {
        name: "instancefs",
        description: &[
            "instancefs mounts a directory in which the virtual machines of a libvirt host are files. Reading a file \
             says what is; writing a file has it done; moving a link between the directories of two states asks for the \
             change. Every ordinary tool and every kind of watcher works on it.",
            "A locked instance refuses every change made through the tree, for root too. Nothing but a draft is \
             destroyed in one step, and the disks of machines that instancefs did not make are never deleted.",
            "A write that returns success was accepted and is durable. Short work is also done by then; longer work \
             goes on as a task, so scripts write a word to state and then run instancefs wait.",
        ],
        exit: &[DONE, FAILED, USAGE],
        environment: &[],
        files: &[
            ("README", "In the root of the tree: what the tree is, in one page."),
            ("health", "In the root of the tree: whether its parts are well."),
            CONFIGURATION,
            STATE,
        ],
        examples: &[
            ("See whether this host is ready, and mount:", "instancefs doctor && instancefs mount --background /vm"),
            (
                "Stop a machine and wait until it is off:",
                "echo stopped > /vm/by-name/instances/web1/state\ninstancefs wait /vm/by-name/instances/web1 --for stopped",
            ),
            ("Let nobody change it:", "echo 1 > /vm/by-name/instances/web1/locked"),
        ],
        see: &[
            "instancefs-mount(1)",
            "instancefs-wait(1)",
            "instancefs-watch(1)",
            "instancefs-doctor(1)",
            "mount.instancefs(8)",
            "virsh(1)",
        ],
    },
    Page {
        name: "instancefs-mount",
        description: &[
            "Mounts the tree on an existing directory and serves it until it is unmounted, or until SIGTERM, SIGINT or \
             SIGHUP. Guests go on running in any case, also when the daemon is killed; the next daemon adopts them.",
            "Without --connect the first mount of a state directory takes the libvirt daemon of the host if it has a \
             socket, and else libvirt's QEMU driver inside its own process. The state directory remembers what was \
             chosen: later mounts use that and nothing else. An ordinary user's machines are his own: the driver runs \
             inside his process, he needs fusermount3, and nobody else enters his tree.",
            "A mount that a dead daemon left on the directory is taken away first. A directory that is mounted by \
             anybody else is refused.",
            "Mount options (-o) are ro, access_group=NAME (who may enter the tree, default libvirt), admin_group=NAME \
             (who may read events and metrics, default adm), projects=A:B (groups that instances may belong to), \
             settle=DURATION, retention=DURATION or never (how long the bin keeps what was moved there, default 7d), \
             shelved_offload_time=DURATION or never (how long after shelving an instance's disks are removed, default \
             never), connect=URI, state_dir=DIR and import_directory=DIR (where files lie that may be imported, default \
             import in the state directory). Options of fstab that mean nothing here are ignored; any other is an error.",
        ],
        exit: &[("0", "Unmounted; with --background: mounted, and the tree answers."), FAILED, USAGE],
        environment: &[
            ACCELERATOR,
            ("RUST_LOG", "What is logged: error, warn, info (default), debug."),
            (
                "NOTIFY_SOCKET, WATCHDOG_USEC",
                "Set by systemd for a unit of Type=notify: it is told when the mount answers, and, with WatchdogSec=, \
                 that the daemon still works off what it is asked. Not with --background.",
            ),
        ],
        files: &[
            CONFIGURATION,
            STATE,
            ("STATE/log", "Messages of a daemon in the background."),
            ("STATE/lock", "Held by the daemon that uses the state directory."),
        ],
        examples: &[
            ("Mount in the background:", "mkdir -p /vm && instancefs mount --background /vm"),
            (
                "Show the machines of another libvirt daemon, read-only:",
                "instancefs mount --connect /run/other/libvirt-sock --state-dir /var/lib/instancefs-other -o ro /mnt",
            ),
            ("Unmount:", "umount /vm"),
        ],
        see: &["instancefs(1)", "instancefs-doctor(1)", "mount.instancefs(8)", "mount(8)", "umount(8)"],
    },
    Page {
        name: "instancefs-wait",
        description: &[
            "Waits until no task works on any of the objects, or with --for until each has reached a state. It fails \
             as soon as nothing works towards that state any more, and says the last error of the object.",
            "A path may be an object's directory, a file in it, or a link to it. An object is followed when it is \
             moved. On a terminal the progress is shown.",
        ],
        exit: &[
            ("0", "All of them are there."),
            ("1", "A task failed, the state cannot be reached, or there is no such object."),
            USAGE,
            ("124", "The time given by --timeout is over, as timeout(1) has it."),
        ],
        environment: &[],
        files: &[],
        examples: &[
            ("Until it runs:", "echo active > instances/$u/state && instancefs wait instances/$u --for active"),
            ("Until an object is gone, for a minute at most:", "instancefs wait images/$m --for deleted --timeout 1m"),
        ],
        see: &["instancefs(1)", "instancefs-watch(1)", "timeout(1)"],
    },
    Page {
        name: "instancefs-watch",
        description: &[
            "Prints a line for each change: the time, the class, the name or id of the object, what changed from what \
             to what, and who did it. Without a path it watches the tree of the current directory, or else the only \
             one that is mounted. It goes on until it is interrupted or the tree is gone.",
            "Who may read the file events of the tree (root and the admin group) is told what is recorded there: \
             every change, refusal and failed operation, and who asked for it. No line is lost or told twice when \
             the file is rotated.",
            "Everybody else, and whoever names a single file or a directory of links, is told how what can be read \
             differs from before. Nobody knows then who did it, and what changes twice within a moment is one change.",
            "Control characters are written as \\u and four digits.",
        ],
        exit: &[
            ("0", "Nobody reads the output any more."),
            ("1", "The tree is not mounted any more, its daemon is gone, or nothing may be read."),
            USAGE,
            ("130", "Interrupted."),
        ],
        environment: &[],
        files: &[("events, events.1", "In the root of the tree: what happened, one JSON object a line.")],
        examples: &[
            ("Everything that happens:", "instancefs watch /vm"),
            ("One machine:", "instancefs watch /vm/by-name/instances/web1"),
            ("Refusals, for a program:", "instancefs watch --json /vm | jq 'select(.errno != \"\")'"),
        ],
        see: &["instancefs(1)", "instancefs-wait(1)", "inotifywait(1)"],
    },
    Page {
        name: "instancefs-doctor",
        description: &[
            "Looks at everything that a mount needs, and says for each what was found: ok, warn (a mount works, but \
             something will not) or fail (a mount does not work). A warning or a failure is followed by what to do \
             about it. It works before the first mount, beside a mount, and for ordinary users.",
            "It changes nothing. What may hang (libvirt, a mount, a network file system) is asked by a child process \
             that is given up after some seconds. Whether KVM works is found out by booting one sector on it.",
        ],
        exit: &[("0", "Nothing fails."), ("1", "Something fails."), USAGE],
        environment: &[ACCELERATOR],
        files: &[CONFIGURATION, STATE],
        examples: &[
            ("Before the first mount:", "instancefs doctor"),
            ("What fails or warns, for a program:", "instancefs doctor --json | jq 'select(.level != \"ok\")'"),
        ],
        see: &["instancefs(1)", "instancefs-mount(1)", "virt-host-validate(1)"],
    },
];

/// The page of the mount helper, in section 8.
pub const HELPER: Page = Page {
    name: "mount.instancefs",
    description: &[
        "mount(8) calls this helper for file systems of the type instancefs. It is the program instancefs under another \
         name: a link /sbin/mount.instancefs to it installs it. The mount goes to the background and returns when the \
         tree answers.",
        "SOURCE is the connection: a libvirt URI or the path of a libvirt socket; none, auto or instancefs mean what \
         the state directory or the configuration says. OPTIONS are those of instancefs-mount(1). The flag -r mounts \
         read-only, -f does nothing but succeed; -n, -s, -v and -w are accepted.",
        "A mount from fstab has no supervisor that starts it again; a systemd unit is better for a host.",
    ],
    exit: &[("0", "The tree is mounted and answers."), FAILED, USAGE],
    environment: &[],
    files: &[("/sbin/mount.instancefs", "A link to the program."), CONFIGURATION, STATE],
    examples: &[
        ("A line of fstab:", "none /vm instancefs noauto,_netdev 0 0"),
        ("The same by hand:", "mount -t instancefs none /vm"),
    ],
    see: &["instancefs(1)", "instancefs-mount(1)", "mount(8)", "fstab(5)"],
};
