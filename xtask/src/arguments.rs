//! Command-line arguments.

use crate::failure::{Failure, Result};

/// The arguments not read yet.
pub struct Arguments(std::vec::IntoIter<String>);

impl Arguments {
    /// The arguments of this process, without its name.
    pub fn from_environment() -> Result<Self> {
        let arguments = std::env::args_os()
            .skip(1)
            .map(|argument| {
                argument.into_string().map_err(|found| {
                    Failure::Usage(format!("expected arguments in UTF-8, found {}", found.display()))
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self(arguments.into_iter()))
    }

    /// These arguments, for tests.
    #[cfg(test)]
    pub fn of(arguments: &[&str]) -> Self {
        Self(arguments.iter().map(|&a| a.to_owned()).collect::<Vec<_>>().into_iter())
    }

    /// The next argument.
    pub fn next(&mut self) -> Option<String> {
        self.0.next()
    }

    /// The argument that `option` demands.
    pub fn value_of(&mut self, option: &str) -> Result<String> {
        self.next().ok_or_else(|| Failure::Usage(format!("{option}: expected a value after it, found none")))
    }

    /// All arguments that are left, as they are.
    pub fn rest(self) -> Vec<String> {
        self.0.collect()
    }
}

/// What to say of an argument that `command` does not know.
pub fn unknown(command: &str, argument: &str, known: &str) -> Failure {
    Failure::Usage(format!("{command}: unknown argument `{argument}`; known: {known}"))
}
