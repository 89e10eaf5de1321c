//! The audited module: every unsafe call into libvirt that the `virt` crate has no safe wrapper for. Here are the event
//! loop and what is asked of domains; what libvirt calls back is in [`events`], consoles are in [`stream`].

pub(super) mod events;
pub(super) mod stream;

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::net::IpAddr;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::OnceLock;
use std::time::Duration;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

/// Registers and starts libvirt's event loop, once per process and before the first connection, and turns libvirt's
/// error messages from stderr to our log.
///
/// # Errors
///
/// The one sentence that says why it could not be started; the same one at every later call.
pub(super) fn initialise() -> Result<(), String> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED.get_or_init(start).clone()
}

fn start() -> Result<(), String> {
    use_utf8();
    silence();
    // SAFETY: `log_error` matches virErrorFunc, lives as long as the program and uses no user data.
    unsafe { sys::virSetErrorFunc(ptr::null_mut(), Some(log_error)) };
    virt::event::event_register_default_impl()
        .map_err(|error| format!("cannot register libvirt's event loop: {}", error.message()))?;
    std::thread::Builder::new()
        .name("libvirt-events".to_owned())
        .spawn(|| {
            loop {
                if let Err(error) = virt::event::event_run_default_impl() {
                    log::error!("libvirt's event loop: {}", error.message());
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        })
        .map_err(|error| format!("cannot start the thread of libvirt's event loop: {error}"))?;
    Ok(())
}

/// libvirt's embedded driver shortens a domain's name to 20 characters for paths, and in the C locale a character is a
/// byte: a name cut within a character is a path that QEMU refuses.
fn use_utf8() {
    // SAFETY: both arguments are null-terminated; this runs once, before libvirt starts any thread, and nothing of
    // ours depends on LC_CTYPE.
    unsafe {
        libc::setlocale(libc::LC_CTYPE, c"".as_ptr());
        let codeset = libc::nl_langinfo(libc::CODESET);
        if codeset.is_null() || CStr::from_ptr(codeset) != c"UTF-8" {
            libc::setlocale(libc::LC_CTYPE, c"C.UTF-8".as_ptr());
        }
    }
}

/// What libvirt would log to stderr comes to us as errors anyway; an administrator's own setting stays.
fn silence() {
    const OUTPUTS: &str = "LIBVIRT_LOG_OUTPUTS";
    if std::env::var_os(OUTPUTS).is_none() {
        // SAFETY: this runs once, before libvirt, the only C library of ours that reads the environment, starts a
        // thread; Rust code is kept apart by the standard library's lock.
        unsafe { std::env::set_var(OUTPUTS, "4:file:/dev/null") };
    }
}

unsafe extern "C" fn log_error(_data: *mut c_void, error: sys::virErrorPtr) {
    if error.is_null() {
        return;
    }
    // SAFETY: libvirt passes a valid error for the time of the call; its message is null or null-terminated.
    let message = unsafe {
        if (*error).message.is_null() {
            return;
        }
        CStr::from_ptr((*error).message).to_string_lossy()
    };
    guard(|| log::debug!("libvirt: {message}"));
}

/// A panic must not cross into libvirt: it would abort the whole program.
fn guard(body: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(body));
}

/// # Safety
///
/// `domain` must be null or valid.
unsafe fn uuid_of(domain: sys::virDomainPtr) -> Option<Uuid> {
    let mut bytes = [0u8; 16];
    // SAFETY: the buffer has VIR_UUID_BUFLEN (16) bytes; libvirt checks the domain.
    let result = unsafe { sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) };
    (result == 0).then(|| Uuid::from_bytes(bytes))
}

/// The state and reason of a domain (`virDomainGetState`). The wrapper of the `virt` crate drops the error.
pub(super) fn state(domain: &Domain) -> Result<(c_int, c_int), Error> {
    let (mut state, mut reason) = (-1, -1);
    // SAFETY: the domain is alive and both pointers are valid for the call.
    let result = unsafe { sys::virDomainGetState(domain.as_ptr(), &mut state, &mut reason, 0) };
    if result < 0 {
        return Err(Error::last_error());
    }
    Ok((state, reason))
}

/// A connection to a graphics device of a running domain, by its index among them (`virDomainOpenGraphicsFD`). Whoever
/// may have it is decided by us: its password is not asked for.
pub(super) fn open_graphics(domain: &Domain, index: u32) -> Result<UnixStream, Error> {
    let number = domain.open_graphics_fd(index, sys::VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH)?;
    let number = c_int::try_from(number).map_err(|_| Error::last_error())?;
    // SAFETY: libvirt made this descriptor for us, and nobody else has it.
    Ok(UnixStream::from(unsafe { OwnedFd::from_raw_fd(number) }))
}

/// The addresses of a running guest from one source (`virDomainInterfaceAddresses`). The wrapper of the `virt` crate
/// leaks what libvirt returns.
pub(super) fn addresses(domain: &Domain, source: sys::virDomainInterfaceAddressesSource) -> Result<Vec<IpAddr>, Error> {
    let mut interfaces: *mut sys::virDomainInterfacePtr = ptr::null_mut();
    // SAFETY: the domain is alive and `interfaces` is valid for the call.
    let count = unsafe { sys::virDomainInterfaceAddresses(domain.as_ptr(), &mut interfaces, source as c_uint, 0) };
    let Ok(count) = usize::try_from(count) else {
        return Err(Error::last_error());
    };
    let mut found = Vec::new();
    for index in 0..count {
        // SAFETY: libvirt returned an array of `count` valid interfaces, each of which we free once and then forget.
        unsafe {
            let interface = *interfaces.add(index);
            found.extend(read_addresses(&*interface));
            sys::virDomainInterfaceFree(interface);
        }
    }
    // SAFETY: the array itself was allocated by libvirt with malloc and is ours to free; null is allowed.
    unsafe { libc::free(interfaces.cast()) };
    Ok(found)
}

/// # Safety
///
/// `interface` must come from `virDomainInterfaceAddresses` and not be freed yet.
unsafe fn read_addresses(interface: &sys::virDomainInterface) -> Vec<IpAddr> {
    let count = if interface.addrs.is_null() { 0 } else { interface.naddrs as usize };
    let text = |index| {
        // SAFETY: the interface has an array of `naddrs` addresses, whose texts are null or null-terminated.
        unsafe {
            let address = (*interface.addrs.add(index)).addr;
            (!address.is_null()).then(|| CStr::from_ptr(address).to_string_lossy().into_owned())
        }
    };
    (0..count).filter_map(|index| text(index)?.parse().ok()).collect()
}

/// One row of [`all_states`].
pub(super) struct DomainState {
    pub(super) uuid: Uuid,
    pub(super) name: String,
    pub(super) state: c_int,
    pub(super) reason: c_int,
}

/// The state and reason of every domain, in one round trip (`virConnectGetAllDomainStats`).
pub(super) fn all_states(connection: &Connect) -> Result<Vec<DomainState>, Error> {
    let mut records: *mut sys::virDomainStatsRecordPtr = ptr::null_mut();
    // SAFETY: the connection is alive and `records` is valid for the call.
    let count =
        unsafe { sys::virConnectGetAllDomainStats(connection.as_ptr(), sys::VIR_DOMAIN_STATS_STATE, &mut records, 0) };
    let Ok(count) = usize::try_from(count) else {
        return Err(Error::last_error());
    };
    let mut states = Vec::with_capacity(count);
    for index in 0..count {
        // SAFETY: libvirt returned an array of `count` valid records, which lives until it is freed below.
        if let Some(state) = unsafe { read_record(*records.add(index)) } {
            states.push(state);
        }
    }
    // SAFETY: the array came from libvirt, is null-terminated and is not used afterwards.
    unsafe { sys::virDomainStatsRecordListFree(records) };
    Ok(states)
}

/// # Safety
///
/// `record` must be a valid record of `virConnectGetAllDomainStats`.
unsafe fn read_record(record: sys::virDomainStatsRecordPtr) -> Option<DomainState> {
    // SAFETY: the caller's promise.
    let record = unsafe { &*record };
    // SAFETY: a record's domain is valid as long as the record.
    let uuid = unsafe { uuid_of(record.dom) }?;
    // SAFETY: as above; the name is null or null-terminated and lives as long as the domain.
    let name = unsafe {
        let name = sys::virDomainGetName(record.dom);
        if name.is_null() {
            return None;
        }
        CStr::from_ptr(name).to_string_lossy().into_owned()
    };
    // SAFETY: the parameters are an array of `nparams` elements of the record.
    let (state, reason) = unsafe {
        (parameter(record, sys::VIR_DOMAIN_STATS_STATE_STATE), parameter(record, sys::VIR_DOMAIN_STATS_STATE_REASON))
    };
    Some(DomainState { uuid, name, state: state?, reason: reason.unwrap_or(0) })
}

/// # Safety
///
/// `record` must be valid.
unsafe fn parameter(record: &sys::virDomainStatsRecord, name: &CStr) -> Option<c_int> {
    let mut value = 0;
    // SAFETY: libvirt searches an array of the given length and writes only on a match of name and type.
    let found = unsafe { sys::virTypedParamsGetInt(record.params, record.nparams, name.as_ptr(), &mut value) };
    (found == 1).then_some(value)
}
