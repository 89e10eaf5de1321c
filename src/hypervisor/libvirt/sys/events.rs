//! What happens on a connection, as libvirt calls back.
//!
//! Callbacks run in the event loop's thread, inside libvirt. They read the domain's UUID (which is local), hand it to a
//! [`Listener`], and return; a listener must not call libvirt and must not block.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::Arc;

use uuid::Uuid;
use virt::connect::Connect;
use virt::error::Error;
use virt::sys;

use super::{guard, uuid_of};

/// Receives what happens on one connection.
pub(in super::super) trait Listener: Send + Sync {
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
pub(in super::super) enum Lifecycle {
    /// The definition was removed; `renamed` if it lives on under another name.
    Undefined { renamed: bool },
    /// The domain stopped here because it was migrated away.
    MigratedAway,
    /// It was defined or started: it lives here.
    Arrived,
    /// Its CPUs were stopped, or go on.
    Frozen,
    /// Anything else.
    Other,
}

impl Lifecycle {
    /// Reads the numbers of a lifecycle event.
    pub(in super::super) fn of(event: c_int, detail: c_int) -> Self {
        let detail = detail as u32;
        match event as u32 {
            sys::VIR_DOMAIN_EVENT_UNDEFINED => {
                Lifecycle::Undefined { renamed: detail == sys::VIR_DOMAIN_EVENT_UNDEFINED_RENAMED }
            }
            sys::VIR_DOMAIN_EVENT_STOPPED if detail == sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED => {
                Lifecycle::MigratedAway
            }
            sys::VIR_DOMAIN_EVENT_DEFINED | sys::VIR_DOMAIN_EVENT_STARTED => Lifecycle::Arrived,
            // Not when a snapshot was reverted to, which changes more.
            sys::VIR_DOMAIN_EVENT_SUSPENDED
                if [sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED, sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR]
                    .contains(&detail) =>
            {
                Lifecycle::Frozen
            }
            sys::VIR_DOMAIN_EVENT_RESUMED if detail == sys::VIR_DOMAIN_EVENT_RESUMED_UNPAUSED => Lifecycle::Frozen,
            _ => Lifecycle::Other,
        }
    }
}

/// Why a connection closed, in words.
pub(in super::super) fn close_reason(reason: c_int) -> &'static str {
    match reason as u32 {
        sys::VIR_CONNECT_CLOSE_REASON_ERROR => "the connection to libvirt failed",
        sys::VIR_CONNECT_CLOSE_REASON_EOF => "libvirt closed the connection",
        sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE => "libvirt stopped answering",
        sys::VIR_CONNECT_CLOSE_REASON_CLIENT => "the connection to libvirt was closed on this side",
        _ => "the connection to libvirt ended",
    }
}

/// The event registrations of one connection; dropping it ends them.
///
/// Ending them may be a round trip: drop it only in a thread that may hang.
pub(in super::super) struct Subscription {
    connection: Arc<Connect>,
    callbacks: Vec<c_int>,
    watches_close: bool,
}

impl Subscription {
    /// Registers `listener` for lifecycle, reboot, metadata, guest agent, I/O error and device events, and for the end of
    /// the connection if `watches_close` (drivers inside our process have no such end).
    pub(in super::super) fn new(
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
