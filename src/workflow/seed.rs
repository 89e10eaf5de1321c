//! What a new guest is told on its seed disk, in cloud-init's NoCloud form.

use uuid::Uuid;

/// The longest label of a host name, in bytes (RFC 1123).
const LABEL_MAX: usize = 63;

/// The longest host name, in bytes, that Linux takes.
const HOST_NAME_MAX: usize = 64;

/// The document that tells a guest who it is. The identity is the instance's, so that cloud-init takes a disk that
/// was copied to another instance for a new machine.
pub(super) fn meta_data(id: Uuid, name: &str) -> String {
    format!("instance-id: {id}\nlocal-hostname: {}\n", host_name(name, id))
}

/// The name as a host name: letters, digits, hyphens, and dots between them. One without any of these is the uuid.
fn host_name(name: &str, id: Uuid) -> String {
    let plain = |character: char| {
        let kept = character.is_ascii_alphanumeric() || character == '.';
        if kept { character.to_ascii_lowercase() } else { '-' }
    };
    let plain: String = name.chars().map(plain).collect();
    let labels = plain.split('.').map(|label| {
        let cut = label.trim_matches('-').get(..LABEL_MAX).unwrap_or(label.trim_matches('-'));
        cut.trim_matches('-')
    });
    let mut host_name = String::new();
    for label in labels.filter(|label| !label.is_empty()) {
        let dot = usize::from(!host_name.is_empty());
        if host_name.len() + dot + label.len() > HOST_NAME_MAX {
            break;
        }
        if dot == 1 {
            host_name.push('.');
        }
        host_name.push_str(label);
    }
    if host_name.is_empty() { id.to_string() } else { host_name }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: Uuid = Uuid::from_u128(7);

    #[test]
    fn a_name_becomes_a_host_name() {
        for (name, expected) in [
            ("web1", "web1"),
            ("Web One", "web-one"),
            ("www.example.org", "www.example.org"),
            ("guest <&> 1", "guest-----1"),
            ("-a..b-", "a.b"),
            ("émile", "mile"),
            ("---", &ID.to_string()),
        ] {
            assert_eq!(host_name(name, ID), expected, "{name}");
        }
        assert_eq!(host_name(&"a".repeat(200), ID).len(), LABEL_MAX);
    }

    #[test]
    fn the_identity_is_the_instances() {
        assert_eq!(meta_data(ID, "web"), format!("instance-id: {ID}\nlocal-hostname: web\n"));
    }

    proptest! {
        #[test]
        fn every_name_gives_a_host_name_that_needs_no_quotes(name in any::<String>()) {
            let host_name = host_name(&name, ID);
            prop_assert!((1..=HOST_NAME_MAX).contains(&host_name.len()));
            for label in host_name.split('.') {
                prop_assert!((1..=LABEL_MAX).contains(&label.len()), "{host_name}");
                prop_assert!(!label.starts_with('-') && !label.ends_with('-'), "{host_name}");
                prop_assert!(label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{host_name}");
            }
        }
    }
}
