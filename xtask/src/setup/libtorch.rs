//! LibTorch: the user's own, or one from the Python packages.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::python::Python;
use super::stamp::Stamp;
use super::wheels::{self, Compute, LIBTORCH_VERSION};
use super::{CHOICE, driver, fetch, files, timed};
use crate::failure::{Failure, Result};
use crate::process;
use crate::repository::Repository;

/// The entry of the stamp for the installed packages.
const PACKAGES: &str = "packages";
/// The entry of the stamp for the link to LibTorch.
const LINK: &str = "libtorch";
/// Where the link points when the packages are used, relative to `.controlgen`.
const IN_PACKAGES: &str = "python/torch";

/// What the user's `LIBTORCH` says.
#[derive(Debug, PartialEq, Eq)]
pub enum Exported {
    /// Nothing: it is not exported, or is what `.cargo/config.toml` makes of that.
    Not,
    /// What set-up puts into place itself, by another way.
    Own(PathBuf),
    /// A LibTorch that will do.
    Good(PathBuf),
    /// Something that will not do, and why.
    Bad(PathBuf, String),
}

impl Exported {
    /// Reads the environment of this process.
    pub fn from_environment(repository: &Repository) -> Result<Self> {
        Self::of(env::var_os("LIBTORCH"), repository)
    }

    fn of(value: Option<OsString>, repository: &Repository) -> Result<Self> {
        let Some(value) = value.filter(|value| !value.is_empty()) else { return Ok(Self::Not) };
        let path = files::absolute(Path::new(&value))?;
        if path == repository.root().join(".controlgen/libtorch") || path == repository.libtorch() {
            return Ok(Self::Not);
        }
        // By whatever way it leads here: a link to our own link would be a loop.
        let inside =
            |path: PathBuf| fs::canonicalize(repository.data()).is_ok_and(|own| path.starts_with(own));
        if [fs::canonicalize(&path).ok(), place(&path)].into_iter().flatten().any(inside) {
            return Ok(Self::Own(path));
        }
        Ok(match check(&path) {
            Ok(()) => Self::Good(path),
            Err(reason) => Self::Bad(path, reason),
        })
    }

    /// What to tell the user, if anything.
    pub fn warning(&self) -> Option<String> {
        let Self::Bad(path, reason) = self else { return None };
        Some(format!(
            "LIBTORCH is exported and names {}: {reason}. It is not used here; LibTorch {LIBTORCH_VERSION} in \
             .controlgen is. `cargo build` on its own would use it: unset LIBTORCH.",
            path.display()
        ))
    }

    /// What `LIBTORCH` is to be for the programs we start: what is exported, if it is good, to the letter, since the
    /// bindings are compiled again when it changes.
    pub fn for_programs(&self, repository: &Repository) -> PathBuf {
        match self {
            Self::Good(path) => path.clone(),
            Self::Own(path) if check(path).is_ok() => path.clone(),
            Self::Not | Self::Own(_) | Self::Bad(..) => repository.libtorch(),
        }
    }
}

/// The path of a file or link itself, with the links on the way to it resolved.
fn place(path: &Path) -> Option<PathBuf> {
    Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?))
}

/// Where LibTorch comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder outside the checkout.
    Folder(PathBuf),
    /// The Python packages, and what led to this choice of them.
    Packages(Compute, String),
}

impl Source {
    /// For messages.
    pub fn named(&self) -> String {
        match self {
            Self::Folder(path) => format!("LibTorch {LIBTORCH_VERSION} in {}", path.display()),
            Self::Packages(Compute::Cpu, reason) => {
                format!("LibTorch {LIBTORCH_VERSION} without CUDA ({reason})")
            }
            Self::Packages(Compute::Cuda, reason) => {
                format!("LibTorch {LIBTORCH_VERSION} with CUDA ({reason})")
            }
        }
    }

    fn link_target(&self) -> &Path {
        match self {
            Self::Folder(path) => path,
            Self::Packages(..) => Path::new(IN_PACKAGES),
        }
    }
}

/// Decides where LibTorch comes from: what is exported; else, unless packages were asked for, the folder that an
/// earlier run linked to; else the packages, with CUDA if asked for now or before, or if there is a driver.
pub fn source(repository: &Repository, exported: &Exported, asked: Option<Compute>, stamp: &Stamp) -> Source {
    if let Exported::Good(path) = exported {
        // Resolved, so that the link cannot lead to itself by way of another.
        return Source::Folder(fs::canonicalize(path).unwrap_or_else(|_| path.clone()));
    }
    if let Some(compute) = asked {
        return Source::Packages(compute, format!("--{}", compute.name()));
    }
    if let Ok(target) = fs::read_link(repository.libtorch())
        && target.is_absolute()
        && check(&target).is_ok()
    {
        return Source::Folder(target);
    }
    if let Some(compute) = stamp.value(CHOICE).and_then(Compute::from_name) {
        return Source::Packages(compute, format!("--{} was asked for earlier", compute.name()));
    }
    match driver::find() {
        Some(trace) => Source::Packages(Compute::Cuda, format!("NVIDIA driver: {}", trace.display())),
        None => Source::Packages(Compute::Cpu, "no NVIDIA driver".into()),
    }
}

/// Is LibTorch in place?
pub fn is_done(source: &Source, stamp: &Stamp) -> bool {
    stamp.holds(LINK, &source.link_target().to_string_lossy()) && packages_are_done(source, stamp)
}

fn packages_are_done(source: &Source, stamp: &Stamp) -> bool {
    match source {
        Source::Folder(_) => true,
        // The packages for CUDA include those for the processor.
        Source::Packages(Compute::Cpu, _) => {
            stamp.holds(PACKAGES, &packages_value(Compute::Cpu))
                || stamp.holds(PACKAGES, &packages_value(Compute::Cuda))
        }
        Source::Packages(Compute::Cuda, _) => stamp.holds(PACKAGES, &packages_value(Compute::Cuda)),
    }
}

fn packages_value(compute: Compute) -> String {
    format!("{} {}", compute.name(), wheels::fingerprint(env::consts::ARCH))
}

/// Puts LibTorch into place.
pub fn ensure(repository: &Repository, source: &Source, stamp: &mut Stamp, temporary: &Path) -> Result<()> {
    if is_done(source, stamp) {
        return Ok(());
    }
    println!("{}", source.named());
    if let Source::Packages(compute, _) = source
        && !packages_are_done(source, stamp)
    {
        install(repository, *compute, stamp, temporary)?;
    }
    let target = source.link_target();
    files::link(target, &repository.libtorch(), temporary)?;
    check(&repository.libtorch())
        .map_err(|reason| Failure::Check(format!("{}: {reason}", repository.libtorch().display())))?;
    let libraries = ["libtorch/lib/libtorch_cpu.so", "libtorch/lib/libc10.so"].map(str::to_owned);
    stamp.note(LINK, &target.to_string_lossy(), &libraries)?;
    stamp.write(temporary)?;
    println!("  linked {} to {}", repository.libtorch().display(), target.display());
    Ok(())
}

fn install(repository: &Repository, compute: Compute, stamp: &mut Stamp, temporary: &Path) -> Result<()> {
    if env::consts::OS != "linux" {
        return Err(Failure::Platform { found: format!("{} on {}", env::consts::OS, env::consts::ARCH) });
    }
    let python = Python::find()?;
    python.demand_glibc()?;
    let wheels = wheels::libtorch(compute, python.minor_for_libtorch(), env::consts::ARCH)?;
    println!("  fetching {} packages with {}", wheels.len(), python.named());
    let paths = fetch(&python, &wheels, &temporary.join("wheels"), temporary)?;
    let unpacked = temporary.join("python");
    timed(|| {
        for path in &paths {
            python.unpack(path, &unpacked)?;
            files::remove(path)?;
        }
        Ok(((), format!("unpacked {}", process::megabytes(files::size_of(&unpacked)))))
    })?;
    check(&unpacked.join("torch"))
        .map_err(|reason| Failure::Check(format!("the packages that pip fetched: {reason}")))?;
    files::replace(&unpacked, &repository.python(), temporary)?;
    let libraries = stamp.files_under(&repository.python(), |file| file.contains(".so"));
    stamp.note(PACKAGES, &packages_value(compute), &libraries)?;
    stamp.write(temporary)
}

/// Is this a LibTorch of the right version? If not, says what was found.
fn check(folder: &Path) -> Result<(), String> {
    for part in ["lib/libtorch_cpu.so", "lib/libc10.so", "include"] {
        if !folder.join(part).exists() {
            return Err(format!("expected LibTorch {LIBTORCH_VERSION}, found no {part} in it"));
        }
    }
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let version = read("build-version")
        .map(|text| text.trim().to_owned())
        .or_else(|| read("version.py").and_then(|text| python_version(&text)))
        .ok_or_else(|| {
            format!("expected LibTorch {LIBTORCH_VERSION}, found no version in build-version or version.py")
        })?;
    // `2.11.0+cu130`: what follows the plus names the build.
    if version.split('+').next() == Some(LIBTORCH_VERSION) {
        Ok(())
    } else {
        Err(format!("expected LibTorch {LIBTORCH_VERSION}, found {version}"))
    }
}

/// The version in PyTorch's `version.py`: `__version__ = '2.11.0+cu130'`.
fn python_version(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let value = line.strip_prefix("__version__")?.trim_start().strip_prefix('=')?;
        Some(value.trim().trim_matches(['\'', '"']).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A folder that looks like LibTorch.
    fn folder(home: &Path, name: &str, version_file: &str, version: &str) -> PathBuf {
        let folder = home.join(name);
        fs::create_dir_all(folder.join("lib")).unwrap();
        fs::create_dir_all(folder.join("include")).unwrap();
        for library in ["libtorch_cpu.so", "libc10.so"] {
            fs::write(folder.join("lib").join(library), b"").unwrap();
        }
        fs::write(folder.join(version_file), version).unwrap();
        folder
    }

    fn repository(home: &Path) -> Repository {
        let repository = Repository::find().unwrap().with_data_in(home);
        fs::create_dir_all(repository.data().join("tmp")).unwrap();
        repository
    }

    #[test]
    fn versions_are_read_from_both_kinds_of_installation() {
        let home = tempfile::tempdir().unwrap();
        let python =
            "from typing import Optional\n\n__all__ = ['__version__']\n__version__ = '2.11.0+cu130'\n";
        assert_eq!(check(&folder(home.path(), "a", "version.py", python)), Ok(()));
        assert_eq!(check(&folder(home.path(), "b", "build-version", "2.11.0+cpu\n")), Ok(()));
        let old = check(&folder(home.path(), "c", "build-version", "2.9.1+cpu")).unwrap_err();
        assert_eq!(old, "expected LibTorch 2.11.0, found 2.9.1+cpu");
        let none = check(&folder(home.path(), "d", "README", "")).unwrap_err();
        assert!(none.contains("found no version"), "{none}");
        let empty = check(home.path()).unwrap_err();
        assert!(empty.contains("found no lib/libtorch_cpu.so"), "{empty}");
    }

    #[test]
    fn what_cargo_sets_is_told_from_what_the_user_exports() {
        let home = tempfile::tempdir().unwrap();
        let repository = repository(home.path());
        let of = |path: &Path| Exported::of(Some(path.into()), &repository).unwrap();
        assert_eq!(Exported::of(None, &repository).unwrap(), Exported::Not);
        assert_eq!(of(Path::new("")), Exported::Not);
        assert_eq!(of(&repository.root().join(".controlgen/libtorch")), Exported::Not);
        assert_eq!(of(&repository.libtorch()), Exported::Not);
        let good = folder(home.path(), "good", "build-version", "2.11.0+cpu");
        assert_eq!(of(&good), Exported::Good(good.clone()));
        assert_eq!(of(&good).for_programs(&repository), good);
        let bad = of(&folder(home.path(), "bad", "build-version", "2.10.0"));
        assert!(bad.warning().is_some_and(|text| text.contains("found 2.10.0")), "{bad:?}");
        assert_eq!(bad.for_programs(&repository), repository.libtorch());
    }

    /// Linking our link to itself would be a loop, so every way to it must be recognised.
    #[test]
    fn our_own_libtorch_is_recognised_by_whatever_way() {
        let home = tempfile::tempdir().unwrap();
        let repository = repository(home.path());
        let other = home.path().join("other-way");
        symlink(repository.data(), &other).unwrap();
        let far = home.path().join("far");
        symlink(other.join("libtorch"), &far).unwrap();
        let of = |path: &Path| Exported::of(Some(path.into()), &repository).unwrap();

        // Before it is in place, what is exported cannot be used yet.
        let through = other.join("libtorch");
        assert_eq!(of(&through), Exported::Own(through.clone()));
        assert_eq!(of(&through).for_programs(&repository), repository.libtorch());

        let packages = folder(repository.data(), "python/torch", "build-version", "2.11.0+cpu");
        symlink(IN_PACKAGES, repository.libtorch()).unwrap();
        for way in [through, far, packages, other.join("python/torch")] {
            assert_eq!(of(&way), Exported::Own(way.clone()));
            assert_eq!(of(&way).for_programs(&repository), way, "kept to the letter");
            let stamp = Stamp::read(repository.data()).unwrap();
            let asked = source(&repository, &of(&way), Some(Compute::Cpu), &stamp);
            assert_eq!(asked.link_target(), Path::new(IN_PACKAGES));
        }
    }

    #[test]
    fn a_folder_outside_is_linked_by_its_resolved_path() {
        let home = tempfile::tempdir().unwrap();
        let repository = repository(home.path());
        let good = folder(home.path(), "good", "build-version", "2.11.0+cpu");
        let link = home.path().join("link");
        symlink(&good, &link).unwrap();
        let exported = Exported::of(Some(link.clone().into()), &repository).unwrap();
        assert_eq!(exported.for_programs(&repository), link);
        let mut stamp = Stamp::read(repository.data()).unwrap();
        let source = source(&repository, &exported, None, &stamp);
        ensure(&repository, &source, &mut stamp, &repository.temporary()).unwrap();
        assert_eq!(fs::read_link(repository.libtorch()).unwrap(), fs::canonicalize(good).unwrap());
    }

    #[test]
    fn a_link_that_leads_nowhere_is_not_noted_as_done() {
        let home = tempfile::tempdir().unwrap();
        let repository = repository(home.path());
        let mut stamp = Stamp::read(repository.data()).unwrap();
        let source = Source::Folder(repository.libtorch());
        let failure =
            ensure(&repository, &source, &mut stamp, &repository.temporary()).unwrap_err().to_string();
        assert!(failure.contains("found no lib/libtorch_cpu.so"), "{failure}");
        assert!(!is_done(&source, &stamp));
    }

    #[test]
    fn the_source_is_what_is_exported_then_what_was_asked_for_then_what_was_linked() {
        let home = tempfile::tempdir().unwrap();
        let repository = repository(home.path());
        let temporary = repository.temporary();
        let mut stamp = Stamp::read(repository.data()).unwrap();
        let good = folder(home.path(), "good", "build-version", "2.11.0+cpu");

        stamp.note(CHOICE, "cuda", &[]).unwrap();
        let remembered = source(&repository, &Exported::Not, None, &stamp);
        assert!(matches!(remembered, Source::Packages(Compute::Cuda, _)), "{remembered:?}");

        let exported = source(&repository, &Exported::Good(good.clone()), Some(Compute::Cpu), &stamp);
        assert_eq!(exported, Source::Folder(good.clone()));
        assert!(!is_done(&exported, &stamp));
        ensure(&repository, &exported, &mut stamp, &temporary).unwrap();
        assert!(is_done(&exported, &stamp));
        assert_eq!(fs::read_link(repository.libtorch()).unwrap(), fs::canonicalize(&good).unwrap());

        // Not exported any more: the link stays, unless packages are asked for or the folder is no longer good.
        let later = source(&repository, &Exported::Not, None, &stamp);
        assert_eq!(later, exported);
        let asked = source(&repository, &Exported::Not, Some(Compute::Cpu), &stamp);
        assert!(matches!(asked, Source::Packages(Compute::Cpu, _)), "{asked:?}");
        fs::write(good.join("build-version"), "2.12.0").unwrap();
        let gone = source(&repository, &Exported::Not, None, &stamp);
        assert!(matches!(gone, Source::Packages(Compute::Cuda, _)), "{gone:?}");
    }

    #[test]
    fn the_packages_for_cuda_serve_the_processor_but_not_the_reverse() {
        let home = tempfile::tempdir().unwrap();
        let repository = repository(home.path());
        let mut stamp = Stamp::read(repository.data()).unwrap();
        let packages = |compute| Source::Packages(compute, String::new());
        stamp.note(PACKAGES, &packages_value(Compute::Cpu), &[]).unwrap();
        assert!(packages_are_done(&packages(Compute::Cpu), &stamp));
        assert!(!packages_are_done(&packages(Compute::Cuda), &stamp));
        stamp.note(PACKAGES, &packages_value(Compute::Cuda), &[]).unwrap();
        assert!(packages_are_done(&packages(Compute::Cpu), &stamp));
        assert!(packages_are_done(&packages(Compute::Cuda), &stamp));
        stamp.note(PACKAGES, "cuda of another list", &[]).unwrap();
        assert!(!packages_are_done(&packages(Compute::Cpu), &stamp));
    }
}
