# shellcheck shell=bash
# What the scripts share; sourced, never run.

# The lowest Rust that the dependencies in Cargo.lock accept (sha2).
RUST_MINIMUM=1.88

top=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # for those who source this
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/instancefs
# Tools of the tests' long form that Debian has not.
# shellcheck disable=SC2034 # for those who source this
tools=$cache/tools

# mkfs.vfat and others, which an ordinary user's PATH lacks on Debian.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

version_at_least() { # HAVE WANT
    [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]
}

# The version of one cargo program; empty if it does not run (a rustup shim without a toolchain).
cargo_version() { # PROGRAM
    "$1" --version 2>/dev/null | sed -n 's/^cargo \([0-9.]*\).*/\1/p'
}

# Puts a cargo that is new enough first on PATH. Debian's lies in /usr/bin and an older one of rustup may hide it.
find_cargo() {
    local program version
    for program in "$(type -P cargo || true)" "${HOME:-/root}/.cargo/bin/cargo" /usr/bin/cargo; do
        [[ -n $program && -x $program ]] || continue
        version=$(cargo_version "$program")
        if [[ -n $version ]] && version_at_least "$version" "$RUST_MINIMUM"; then
            export PATH="${program%/*}:$PATH"
            return 0
        fi
    done
    return 1
}

# Where cargo puts the programs it builds, which the user may have moved.
target_directory() {
    local directory=${CARGO_TARGET_DIR:-$top/target}
    case $directory in
        /*) say "$directory" ;;
        *) say "$top/$directory" ;;
    esac
}

# Waits for a condition, looking ten times a second; fails when the seconds are over.
wait_until() { # SECONDS COMMAND...
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

gone() { ! kill -0 "$1" 2>/dev/null; } # PID
