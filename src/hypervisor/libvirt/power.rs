//! libvirt's states and reasons (`virDomainState` and one reason enumeration for each) in our words.

use std::ffi::c_int;

use virt::domain::{
    DomainCrashedReason, DomainCrashedReasonEnum, DomainPausedReason, DomainPausedReasonEnum, DomainRunningReason,
    DomainRunningReasonEnum, DomainShutdownReason, DomainShutdownReasonEnum, DomainShutoffReason,
    DomainShutoffReasonEnum, DomainState, DomainStateEnum,
};

use crate::hypervisor::PowerState;

/// The word for a reason that libvirt does not know, or that we do not.
const UNKNOWN: &str = "unknown";

/// What a state and reason number of libvirt mean.
///
/// A state that we do not know, and NOSTATE (Xen says it of domains that exist and are doing nothing), count as
/// running: nobody may touch the disks of such a domain.
pub(super) fn power(state: c_int, reason: c_int) -> (PowerState, &'static str) {
    let reason = reason as u32;
    match DomainStateEnum::from_raw(state as u32).known() {
        None | Some(DomainState::NoState | DomainState::Blocked) => (PowerState::Running, UNKNOWN),
        Some(DomainState::Running) => {
            (PowerState::Running, DomainRunningReasonEnum::from_raw(reason).known().map_or(UNKNOWN, running))
        }
        Some(DomainState::Shutdown) => {
            (PowerState::Running, DomainShutdownReasonEnum::from_raw(reason).known().map_or(UNKNOWN, shutdown))
        }
        Some(DomainState::Paused) => {
            (PowerState::Paused, DomainPausedReasonEnum::from_raw(reason).known().map_or(UNKNOWN, paused))
        }
        Some(DomainState::PMSuspended) => (PowerState::PmSuspended, UNKNOWN),
        Some(DomainState::Shutoff) => {
            (PowerState::ShutOff, DomainShutoffReasonEnum::from_raw(reason).known().map_or(UNKNOWN, shut_off))
        }
        Some(DomainState::Crashed) => {
            (PowerState::Crashed, DomainCrashedReasonEnum::from_raw(reason).known().map_or(UNKNOWN, crashed))
        }
    }
}

fn running(reason: DomainRunningReason) -> &'static str {
    match reason {
        DomainRunningReason::Unknown => UNKNOWN,
        DomainRunningReason::Booted => "booted",
        DomainRunningReason::Migrated => "migrated",
        DomainRunningReason::Restored => "restored",
        DomainRunningReason::FromSnapshot => "from_snapshot",
        DomainRunningReason::Unpaused => "unpaused",
        DomainRunningReason::MigrationCancelled => "migration_canceled",
        DomainRunningReason::SaveCancelled => "save_canceled",
        DomainRunningReason::Wakeup => "wakeup",
        DomainRunningReason::Crashed => "crashed",
        DomainRunningReason::PostCopy => "postcopy",
        DomainRunningReason::PostCopyFailed => "postcopy_failed",
    }
}

fn shutdown(reason: DomainShutdownReason) -> &'static str {
    match reason {
        DomainShutdownReason::Unknown => UNKNOWN,
        DomainShutdownReason::User => "user",
    }
}

fn paused(reason: DomainPausedReason) -> &'static str {
    match reason {
        DomainPausedReason::Unknown => UNKNOWN,
        DomainPausedReason::User => "user",
        DomainPausedReason::Migration => "migration",
        DomainPausedReason::Save => "save",
        DomainPausedReason::Dump => "dump",
        DomainPausedReason::IOError => "ioerror",
        DomainPausedReason::Watchdog => "watchdog",
        DomainPausedReason::FromSnapshot => "from_snapshot",
        DomainPausedReason::ShuttingDown => "shutting_down",
        DomainPausedReason::Snapshot => "snapshot",
        DomainPausedReason::Crashed => "crashed",
        DomainPausedReason::StartingUp => "starting_up",
        DomainPausedReason::PostCopy => "postcopy",
        DomainPausedReason::PostCopyFailed => "postcopy_failed",
        DomainPausedReason::APIError => "api_error",
    }
}

fn shut_off(reason: DomainShutoffReason) -> &'static str {
    match reason {
        DomainShutoffReason::Unknown => UNKNOWN,
        DomainShutoffReason::Shutdown => "shutdown",
        DomainShutoffReason::Destroyed => "destroyed",
        DomainShutoffReason::Crashed => "crashed",
        DomainShutoffReason::Migrated => "migrated",
        DomainShutoffReason::Saved => "saved",
        DomainShutoffReason::Failed => "failed",
        DomainShutoffReason::FromSnapshot => "from_snapshot",
        DomainShutoffReason::Daemon => "daemon",
    }
}

fn crashed(reason: DomainCrashedReason) -> &'static str {
    match reason {
        DomainCrashedReason::Unknown => UNKNOWN,
        DomainCrashedReason::Panicked => "panicked",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_of_libvirt_has_our_power_state() {
        let words: Vec<_> = (0..8).map(|state| power(state, 1)).collect();
        assert_eq!(
            words,
            [
                (PowerState::Running, "unknown"),
                (PowerState::Running, "booted"),
                (PowerState::Running, "unknown"),
                (PowerState::Paused, "user"),
                (PowerState::Running, "user"),
                (PowerState::ShutOff, "shutdown"),
                (PowerState::Crashed, "panicked"),
                (PowerState::PmSuspended, "unknown"),
            ]
        );
    }

    #[test]
    fn every_shut_off_and_paused_reason_has_its_word() {
        let shut_off: Vec<_> = (0..9).map(|reason| power(5, reason).1).collect();
        assert_eq!(
            shut_off,
            ["unknown", "shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from_snapshot", "daemon"]
        );
        assert_eq!(power(3, 5), (PowerState::Paused, "ioerror"));
        assert_eq!(power(3, 14), (PowerState::Paused, "api_error"));
    }

    #[test]
    fn a_number_of_a_newer_libvirt_counts_as_running_or_unknown() {
        assert_eq!(power(99, 0), (PowerState::Running, "unknown"));
        assert_eq!(power(5, 99), (PowerState::ShutOff, "unknown"));
        assert_eq!(power(-1, -1), (PowerState::Running, "unknown"));
    }
}
