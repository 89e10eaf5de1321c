//! What nobody may read who was not given it: no log, no record and no core shows it longer than needed.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// A text that is overwritten in memory when it is dropped, and that no formatting shows.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes it over.
    pub fn new(text: String) -> Secret {
        Secret(Zeroizing::new(text))
    }

    /// The same with a newline behind it.
    pub fn line(&self) -> Secret {
        let mut line = String::with_capacity(self.0.len() + 1);
        line.push_str(&self.0);
        line.push('\n');
        Secret::new(line)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// In a time that tells nothing of how much of them is alike.
impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        self.bytes().ct_eq(other.bytes()).into()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_compared_as_a_whole_and_never_shown() {
        let secret = Secret::new("swordfish".to_owned());
        assert_eq!(secret, Secret::new("swordfish".to_owned()));
        for other in ["", "swordfis", "swordfisH", "swordfish "] {
            assert_ne!(secret, Secret::new(other.to_owned()));
        }
        assert_eq!(format!("{secret:?}"), "Secret");
    }
}
