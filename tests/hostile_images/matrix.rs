//! The corpus against the inspector itself, with every claim.

use std::collections::HashSet;
use std::path::Path;

use instancefs::image::inspect::inspect;

use super::corpus::{controls, corpus};
use super::file;
use super::support::errno;

#[test]
fn every_hostile_image_is_refused_whatever_is_claimed_and_says_why() {
    let corpus = corpus(Path::new("/var/lib/canary"));
    let mut distinct = HashSet::new();
    for case in &corpus {
        assert!(distinct.insert((&case.bytes, case.claims[0])), "{} is there twice", case.name);
        let file = file(&case.bytes);
        for (index, claim) in case.claims.iter().enumerate() {
            let refusal = match inspect(&file, *claim) {
                Ok(found) => panic!("{} is accepted as {found:?} when claimed {claim:?}", case.name),
                Err(refusal) => refusal.to_string(),
            };
            assert!(index > 0 || refusal.contains(case.reason), "{}: {refusal}", case.name);
        }
    }
    assert!(corpus.len() >= 200, "{}", corpus.len());
}

#[test]
fn sound_images_are_accepted() {
    for (name, bytes, claim, format) in controls() {
        let found = inspect(&file(&bytes), claim).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        assert_eq!(found.format, format, "{name}");
    }
}

#[test]
fn lengths_that_no_disk_has_are_refused_without_being_read() {
    let file = file(&[0; 512]);
    for length in [(64 << 40) + 1, 1 << 60, i64::MAX as u64] {
        if errno(file.set_len(length)) == 0 {
            assert!(
                inspect(&file, None).is_err_and(|refusal| refusal.to_string().contains("virtual size")),
                "{length}"
            );
        }
    }
    assert!(file.metadata().expect("attributes").len() > 1 << 60, "memory files are never too long");
}
