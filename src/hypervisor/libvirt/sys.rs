//! The audited module: every unsafe call into libvirt that the `virt` crate has no safe wrapper for.
//!
//! Callbacks run in the event loop's thread, inside libvirt. They read the domain's UUID (which is local), hand it to a
//! [`Listener`], and return; a listener must not call libvirt and must not block.

pub(super) mod stream;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::net::IpAddr;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

/// Receives what happens on one connection.
pub(super) trait Listener: Send + Sync {
    /// A lifecycle event with libvirt's own numbers (`virDomainEventType` and the detail that belongs to it).
    fn lifecycle(&self, uuid: Uuid, event: c_int, detail: c_int);
    /// Something else about this domain changed.
    fn changed(&self, uuid: Uuid);
    /// This domain's guest restarted.
    fn rebooted(&self, uuid: Uuid);
    /// A device is out of this domain's guest.
    fn device_removed(&self, uuid: Uuid);
    /// The guest refused to let this device go; the name is libvirt's alias.
    fn device_kept(&self, uuid: Uuid, alias: String);
    /// The connection closed (`virConnectCloseReason`).
    fn closed(&self, reason: c_int);
}

/// A lifecycle event's meaning, as far as we tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lifecycle {
    /// The definition was removed; `renamed` if it lives on under another name.
    Undefined { renamed: bool },
    /// The domain stopped here because it was migrated away.
    MigratedAway,
    /// It was defined or started: it lives here.
    Arrived,
    /// Anything else.
    Other,
}

impl Lifecycle {
    /// Reads the numbers of a lifecycle event.
    pub(super) fn of(event: c_int, detail: c_int) -> Self {
        let detail = detail as u32;
        match event as u32 {
            sys::VIR_DOMAIN_EVENT_UNDEFINED => {
                Lifecycle::Undefined { renamed: detail == sys::VIR_DOMAIN_EVENT_UNDEFINED_RENAMED }
            }
            sys::VIR_DOMAIN_EVENT_STOPPED if detail == sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED => {
                Lifecycle::MigratedAway
            }
            sys::VIR_DOMAIN_EVENT_DEFINED | sys::VIR_DOMAIN_EVENT_STARTED => Lifecycle::Arrived,
            _ => Lifecycle::Other,
        }
    }
}

/// Why a connection closed, in words.
pub(super) fn close_reason(reason: c_int) -> &'static str {
    match reason as u32 {
        sys::VIR_CONNECT_CLOSE_REASON_ERROR => "the connection to libvirt failed",
        sys::VIR_CONNECT_CLOSE_REASON_EOF => "libvirt closed the connection",
        sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE => "libvirt stopped answering",
        sys::VIR_CONNECT_CLOSE_REASON_CLIENT => "the connection to libvirt was closed on this side",
        _ => "the connection to libvirt ended",
    }
}

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

/// The event registrations of one connection; dropping it ends them.
///
/// Ending them may be a round trip: drop it only in a thread that may hang.
pub(super) struct Subscription {
    connection: Arc<Connect>,
    callbacks: Vec<c_int>,
    watches_close: bool,
}

impl Subscription {
    /// Registers `listener` for lifecycle, reboot, metadata, guest agent, I/O error and device events, and for the end of
    /// the connection if `watches_close` (drivers inside our process have no such end).
    pub(super) fn new(
        connection: Arc<Connect>,
        listener: &Arc<dyn Listener>,
        watches_close: bool,
    ) -> Result<Self, Error> {
        let mut subscription = Subscription { connection, callbacks: Vec::new(), watches_close: false };
        // SAFETY: libvirt keeps the callback as a generic function pointer and calls it with the signature that belongs
        // to the event's id; each function below has that signature.
        let callbacks = unsafe {
            [
                (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, generic(on_lifecycle as *const ())),
                (sys::VIR_DOMAIN_EVENT_ID_REBOOT, generic(on_reboot as *const ())),
                (sys::VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, generic(on_metadata as *const ())),
                (sys::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, generic(on_agent as *const ())),
                (sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, generic(on_io_error as *const ())),
                (sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, generic(on_device_added as *const ())),
                (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, generic(on_device_removed as *const ())),
                (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, generic(on_device_kept as *const ())),
            ]
        };
        for (event, callback) in callbacks {
            let opaque = listener_to_opaque(listener);
            // SAFETY: the connection is alive; `opaque` owns one listener, which `free_listener` frees exactly once:
            // libvirt calls it at deregistration, and only if the registration succeeded.
            let id = unsafe {
                sys::virConnectDomainEventRegisterAny(
                    subscription.connection.as_ptr(),
                    ptr::null_mut(),
                    event as c_int,
                    callback,
                    opaque,
                    Some(free_listener),
                )
            };
            if id < 0 {
                let error = Error::last_error();
                // SAFETY: the registration failed, so libvirt neither kept nor freed `opaque`.
                unsafe { free_listener(opaque) };
                return Err(error);
            }
            subscription.callbacks.push(id);
        }
        if watches_close {
            let opaque = listener_to_opaque(listener);
            // SAFETY: as above.
            let result = unsafe {
                sys::virConnectRegisterCloseCallback(
                    subscription.connection.as_ptr(),
                    Some(on_close),
                    opaque,
                    Some(free_listener),
                )
            };
            if result < 0 {
                let error = Error::last_error();
                // SAFETY: as above.
                unsafe { free_listener(opaque) };
                return Err(error);
            }
            subscription.watches_close = true;
        }
        Ok(subscription)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        for id in self.callbacks.drain(..) {
            // SAFETY: the connection is alive (we hold it) and the id is ours. A failure (the other side is gone)
            // changes nothing for us: the local registration is gone either way.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connection.as_ptr(), id) };
        }
        if self.watches_close {
            // SAFETY: as above, with the function that was registered.
            unsafe { sys::virConnectUnregisterCloseCallback(self.connection.as_ptr(), Some(on_close)) };
        }
    }
}

/// # Safety
///
/// `function` must be an `unsafe extern "C"` function of the signature of the event that it is registered for.
unsafe fn generic(function: *const ()) -> sys::virConnectDomainEventGenericCallback {
    // SAFETY: function pointers have one size, and the option uses the null niche.
    unsafe { std::mem::transmute::<*const (), sys::virConnectDomainEventGenericCallback>(function) }
}

fn listener_to_opaque(listener: &Arc<dyn Listener>) -> *mut c_void {
    Box::into_raw(Box::new(Arc::clone(listener))).cast()
}

unsafe extern "C" fn free_listener(opaque: *mut c_void) {
    // SAFETY: `opaque` comes from `listener_to_opaque` and is freed once (see the registrations).
    let listener = unsafe { Box::from_raw(opaque.cast::<Arc<dyn Listener>>()) };
    guard(|| drop(listener));
}

/// # Safety
///
/// `opaque` must come from `listener_to_opaque` and not be freed yet; `domain` must be null or valid.
unsafe fn deliver(domain: sys::virDomainPtr, opaque: *mut c_void, body: impl FnOnce(&dyn Listener, Uuid)) {
    // SAFETY: the caller's promise.
    let listener = unsafe { &*opaque.cast::<Arc<dyn Listener>>() };
    // SAFETY: the caller's promise.
    if let Some(uuid) = unsafe { uuid_of(domain) } {
        guard(|| body(listener.as_ref(), uuid));
    }
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

unsafe extern "C" fn on_lifecycle(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a valid domain and the opaque of the registration.
    unsafe {
        deliver(domain, opaque, |listener, uuid| {
            listener.lifecycle(uuid, event, detail);
        });
    }
    0
}

unsafe extern "C" fn on_reboot(_connection: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: libvirt passes a valid domain and the opaque of the registration.
    unsafe { deliver(domain, opaque, |listener, uuid| listener.rebooted(uuid)) };
}

unsafe extern "C" fn on_metadata(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _kind: c_int,
    _namespace: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a valid domain and the opaque of the registration.
    unsafe { deliver(domain, opaque, |listener, uuid| listener.changed(uuid)) };
}

unsafe extern "C" fn on_agent(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _state: c_int,
    _reason: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a valid domain and the opaque of the registration.
    unsafe { deliver(domain, opaque, |listener, uuid| listener.changed(uuid)) };
}

unsafe extern "C" fn on_io_error(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _path: *const c_char,
    _device: *const c_char,
    _action: c_int,
    _reason: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a valid domain and the opaque of the registration.
    unsafe { deliver(domain, opaque, |listener, uuid| listener.changed(uuid)) };
}

unsafe extern "C" fn on_device_added(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a valid domain and the opaque of the registration.
    unsafe { deliver(domain, opaque, |listener, uuid| listener.changed(uuid)) };
}

unsafe extern "C" fn on_device_removed(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _alias: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a valid domain and the opaque of the registration.
    unsafe { deliver(domain, opaque, |listener, uuid| listener.device_removed(uuid)) };
}

unsafe extern "C" fn on_device_kept(
    _connection: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    alias: *const c_char,
    opaque: *mut c_void,
) {
    if alias.is_null() {
        return;
    }
    // SAFETY: libvirt passes a null-terminated alias for the time of the call.
    let alias = unsafe { CStr::from_ptr(alias) }.to_string_lossy().into_owned();
    // SAFETY: libvirt passes a valid domain and the opaque of the registration.
    unsafe { deliver(domain, opaque, |listener, uuid| listener.device_kept(uuid, alias)) };
}

unsafe extern "C" fn on_close(_connection: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt passes the opaque of the registration, not freed yet.
    let listener = unsafe { &*opaque.cast::<Arc<dyn Listener>>() };
    guard(|| listener.closed(reason));
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
