//! libvirt's errors as [`HypervisorError`], by their codes.

use virt::error::{Error, ErrorDomain, ErrorNumber};

use crate::hypervisor::HypervisorError;

/// What an error means if it is an answer of the hypervisor itself, `None` if the code alone does not say.
pub(super) fn definite(error: &Error) -> Option<HypervisorError> {
    let message = || error.message().to_owned();
    match error.code().known()? {
        ErrorNumber::NoNetwork => Some(HypervisorError::InvalidState(of_network(error))),
        ErrorNumber::OperationInvalid if error.domain().known() == Some(ErrorDomain::Network) => {
            Some(HypervisorError::InvalidState(of_network(error)))
        }
        ErrorNumber::NoDomain => Some(HypervisorError::NoDomain),
        ErrorNumber::OperationInvalid => Some(HypervisorError::InvalidState(message())),
        ErrorNumber::DomExist => Some(HypervisorError::Exists(message())),
        ErrorNumber::NoSupport
        | ErrorNumber::ConfigUnsupported
        | ErrorNumber::ArgumentUnsupported
        | ErrorNumber::OperationUnsupported => Some(HypervisorError::Unsupported(message())),
        _ => None,
    }
}

/// Why a guest cannot have its network, one of libvirt's.
fn of_network(error: &Error) -> String {
    format!("{}; virsh net-list --all shows the host's networks, and virsh net-start starts one", error.message())
}

/// The code says that the driver does not know a flag.
pub(super) fn is_unknown_flag(error: &Error) -> bool {
    error.code().is_any(vec![ErrorNumber::InvalidArg, ErrorNumber::ArgumentUnsupported, ErrorNumber::NoSupport])
}

/// What an error means. The same codes (RPC, SYSTEM_ERROR, INTERNAL_ERROR) come from a broken connection and from a
/// daemon that failed at something of its own, so the connection itself is asked: `alive` is `virConnectIsAlive`, which
/// is local.
pub(super) fn judge(error: &Error, alive: bool) -> HypervisorError {
    definite(error).unwrap_or_else(|| {
        let message = error.message().to_owned();
        if alive { HypervisorError::Failed(message) } else { HypervisorError::Unreachable(message) }
    })
}
