//! One set-up at a time.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::Instant;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::failure::{Failure, Result};
use crate::process;

/// Takes the lock, waiting for another run that has it. The system lets go of it when the file is closed, however the
/// process ends.
pub fn take(path: &Path) -> Result<File> {
    let failed = |error| Failure::io("locking", path, error);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let begin = Instant::now();
            println!("another set-up is under way: waiting for it");
            retry(|| flock(&file, FlockOperation::LockExclusive)).map_err(|error| failed(error.into()))?;
            println!("waited {}", process::time(begin.elapsed()));
        }
        Err(error) => return Err(failed(error.into())),
    }
    Ok(file)
}

fn retry(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[test]
    fn the_second_waits_for_the_first() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("lock");
        let first = take(&path).unwrap();
        let released = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                let _lock = take(&path).unwrap();
                released.load(Ordering::SeqCst)
            });
            std::thread::sleep(Duration::from_millis(100));
            released.store(true, Ordering::SeqCst);
            drop(first);
            assert!(second.join().unwrap(), "the second got the lock while the first had it");
        });
    }
}
