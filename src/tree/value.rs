//! Text to values: the rules that hold for every writable file.

use crate::model::reason::Reason;

/// The longest value; anything longer is malformed.
pub const LONGEST: usize = 4096;

/// The bytes of one write as a value: UTF-8, one line, no control characters, trailing whitespace dropped.
pub fn text(bytes: &[u8]) -> Result<&str, Reason> {
    let value = lines(bytes)?;
    if value.contains('\n') {
        return Err(malformed("a value is one line"));
    }
    Ok(value)
}

/// The same of a value that may have several lines.
pub fn lines(bytes: &[u8]) -> Result<&str, Reason> {
    if bytes.len() > LONGEST {
        return Err(malformed("a value has at most 4096 bytes"));
    }
    let value = std::str::from_utf8(bytes).map_err(|_| malformed("a value is UTF-8 text"))?.trim_end();
    if value.chars().any(|character| character.is_control() && !matches!(character, '\t' | '\n')) {
        return Err(malformed("a value has no control characters"));
    }
    Ok(value)
}

/// A sentence for `EINVAL`.
pub fn malformed(sentence: &str) -> Reason {
    Reason::Malformed(sentence.to_owned())
}

/// Refuses the empty value, for files that it does not clear.
pub fn filled(value: &str) -> Result<&str, Reason> {
    if value.is_empty() { Err(malformed("an empty value means nothing here")) } else { Ok(value) }
}

/// The kernel's set of booleans (`kstrtobool`), and the words for them.
pub fn boolean(value: &str) -> Result<bool, Reason> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "y" | "yes" | "on" | "true" => Ok(true),
        "0" | "n" | "no" | "off" | "false" => Ok(false),
        _ => Err(malformed("write 0 or 1 (or no, yes, off, on, false, true)")),
    }
}

/// A verb without an argument takes `1`.
pub fn one(value: &str) -> Result<(), Reason> {
    if value == "1" { Ok(()) } else { Err(malformed("write 1 to do it")) }
}

/// A plain decimal, with `K M G T` (1024) if `unit` is bytes.
pub fn number(value: &str, low: u64, high: u64, unit: &'static str) -> Result<u64, Reason> {
    let (digits, shift) = match value.char_indices().last() {
        Some((at, suffix)) if unit == "bytes" && suffix.is_ascii_alphabetic() => {
            let shift = match suffix.to_ascii_uppercase() {
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                _ => return Err(malformed("the suffixes of sizes are K, M, G and T")),
            };
            (&value[..at], shift)
        }
        Some(_) | None => (value, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(malformed("write a plain decimal number"));
    }
    let out_of_range = Reason::OutOfRange { low, high, unit };
    let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    match number {
        Some(number) if (low..=high).contains(&number) => Ok(number),
        Some(_) | None => Err(out_of_range),
    }
}

const KIBIBYTE: u64 = 1 << 10;
const MEBIBYTE: u64 = 1 << 20;
const TEBIBYTE: u64 = 1 << 40;

/// A number of virtual CPUs.
pub fn vcpus(value: &str) -> Result<u32, Reason> {
    u32::try_from(number(value, 1, 512, "")?).map_err(|_| malformed("too many"))
}

/// A guest's memory, in libvirt's unit of 1024 bytes.
pub fn memory_bytes(value: &str) -> Result<u64, Reason> {
    number(value, 4 * MEBIBYTE, 64 * TEBIBYTE, "bytes").map(|bytes| bytes.next_multiple_of(KIBIBYTE))
}

/// The size of a root disk.
pub fn root_disk_bytes(value: &str) -> Result<u64, Reason> {
    number(value, MEBIBYTE, 64 * TEBIBYTE, "bytes")
}

/// The longest name as `by-name` writes it.
pub const LONGEST_NAME: usize = 218;

/// An object's name: not empty, and short enough for `by-name`.
pub fn name(value: &str) -> Result<String, Reason> {
    let value = filled(value)?;
    if value.contains('\t') {
        return Err(malformed("a name has no control characters"));
    }
    if escape(value).len() > LONGEST_NAME {
        return Err(malformed("a name has at most 218 bytes, counting / % and a leading dot as three each"));
    }
    Ok(value.to_owned())
}

/// An instance's name, which is also libvirt's: no slash.
pub fn instance_name(value: &str) -> Result<String, Reason> {
    if value.contains('/') {
        return Err(malformed("libvirt allows no / in a name"));
    }
    if value.trim() != value || matches!(value, "." | "..") {
        return Err(malformed("libvirt allows no name of dots, nor one that begins with a space"));
    }
    name(value)
}

/// A key of `metadata/`, from its file name.
pub fn metadata_key(file_name: &str) -> Result<String, Reason> {
    name(&unescape(file_name).ok_or_else(|| malformed("this is no key as a file name is written"))?)
}

/// A name as a file name: `/`, `%`, control bytes and a leading dot are written `%XX`.
pub fn escape(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for (at, character) in name.char_indices() {
        if character == '/' || character == '%' || character.is_control() || (at == 0 && character == '.') {
            let mut bytes = [0; 4];
            for byte in character.encode_utf8(&mut bytes).bytes() {
                escaped.push_str(&format!("%{byte:02X}"));
            }
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// The name behind a file name; `None` if a `%` is not followed by two hexadecimal digits or the bytes are not UTF-8.
pub fn unescape(file_name: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(file_name.len());
    let mut rest = file_name.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            let digits = std::str::from_utf8(&digits).ok().filter(|_| digits.iter().all(u8::is_ascii_hexdigit))?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn errno<T: std::fmt::Debug>(result: Result<T, Reason>) -> i32 {
        result.expect_err("refused").errno()
    }

    #[test]
    fn a_value_is_one_line_of_text_and_its_trailing_whitespace_is_dropped() {
        assert_eq!(text(b"active \t\n\n").expect("valid"), "active");
        for bad in [&b"a\nb"[..], b"a\0", b"\xff\xfe", &[b'a'; 5000], b"a\x1b[0m"] {
            assert_eq!(errno(text(bad)), libc::EINVAL);
        }
    }

    #[test]
    fn numbers_take_suffixes_for_bytes_only_and_are_checked_against_their_range() {
        assert_eq!(number("512M", 1, u64::MAX, "bytes").expect("valid"), 512 << 20);
        assert_eq!(errno(number("512M", 1, 1 << 40, "seconds")), libc::EINVAL);
        assert_eq!(errno(number("99999999999999999999", 1, 9, "")), libc::ERANGE);
        assert_eq!(errno(number("18000000000G", 1, u64::MAX, "bytes")), libc::ERANGE);
        assert_eq!(errno(number("0", 1, 9, "")), libc::ERANGE);
        for bad in ["", "-1", "+1", "1.5", "0x10", "M", "1MB", "1é"] {
            assert_eq!(errno(number(bad, 0, 9, "bytes")), libc::EINVAL, "{bad:?}");
        }
    }

    #[test]
    fn names_at_the_limit_pass_and_one_byte_more_is_refused() {
        assert!(name(&"a".repeat(218)).is_ok());
        assert_eq!(errno(name(&"a".repeat(219))), libc::EINVAL);
        assert!(name(&"%".repeat(72)).is_ok());
        assert_eq!(errno(name(&"%".repeat(73))), libc::EINVAL);
        assert_eq!(errno(instance_name("a/b")), libc::EINVAL);
    }

    proptest! {
        #[test]
        fn every_name_survives_its_escape_and_is_one_plain_file_name(name in "\\PC{1,60}|[/%.\n\t]{1,9}") {
            let escaped = escape(&name);
            prop_assert!(!escaped.contains('/') && !escaped.starts_with('.') && !escaped.chars().any(char::is_control));
            prop_assert_eq!(unescape(&escaped), Some(name));
        }
    }
}
