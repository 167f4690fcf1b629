//! SHA-256 of files.

use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::files;
use crate::failure::{Failure, Result};

/// The SHA-256 of a text, in hexadecimal.
pub fn of_text(text: &str) -> String {
    hexadecimal(&Sha256::digest(text))
}

/// The SHA-256 of a file, in hexadecimal.
pub fn of_file(path: &Path) -> Result<String> {
    let failed = |error| Failure::io("reading", path, error);
    let mut file = File::open(path).map_err(failed)?;
    let mut sum = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hexadecimal(&sum.finalize())),
            read => sum.update(&buffer[..read]),
        }
    }
}

/// Demands that a file have this SHA-256; deletes it otherwise.
pub fn demand(path: &Path, expected: &str) -> Result<()> {
    let found = of_file(path)?;
    if found == expected {
        return Ok(());
    }
    files::remove(path)?;
    Err(Failure::Damaged { file: path.to_owned(), expected: expected.to_owned(), found })
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of FIPS 180-4 for no bytes and for "abc".
    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn sums_are_those_of_the_standard() {
        assert_eq!(of_text(""), EMPTY);
        assert_eq!(of_text("abc"), ABC);
    }

    #[test]
    fn a_damaged_file_is_refused_and_deleted() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("model.gguf");
        std::fs::write(&path, b"abc").unwrap();
        demand(&path, ABC).unwrap();
        std::fs::write(&path, b"abd").unwrap();
        let failure = demand(&path, ABC).unwrap_err();
        let text = failure.to_string();
        assert!(text.contains("model.gguf: expected SHA-256 ba78") && text.contains("deleted"), "{text}");
        assert!(!path.exists());
    }

    #[test]
    fn a_file_longer_than_the_buffer_is_read_whole() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("large");
        let text = "controlgen".repeat(300_000);
        std::fs::write(&path, &text).unwrap();
        assert_eq!(of_file(&path).unwrap(), of_text(&text));
    }
}
