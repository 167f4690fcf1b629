//! The command line: positional arguments and `--flag value`.

use std::path::PathBuf;

use controlgen_core::{Error, Placement, Result, device, kind};

/// Parsed arguments.
pub struct Arguments {
    positional: Vec<String>,
    flags: Vec<(String, String)>,
    switches: Vec<String>,
}

impl Arguments {
    /// Parses `arguments`, of which flags may be only those `known`.
    pub fn parse(arguments: &[String], known: &[&str]) -> Result<Self> {
        Self::parse_with(arguments, known, &[])
    }

    /// Parses `arguments`, among them switches, which have no value.
    pub fn parse_with(arguments: &[String], known: &[&str], switched: &[&str]) -> Result<Self> {
        let (mut positional, mut flags, mut switches) = (Vec::new(), Vec::new(), Vec::new());
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let Some(flag) = argument.strip_prefix("--") else {
                positional.push(argument.clone());
                continue;
            };
            if switched.contains(&flag) {
                switches.push(flag.to_owned());
                continue;
            }
            if !known.contains(&flag) {
                let expected = format!("one of --{}", [known, switched].concat().join(", --"));
                return Err(Error::value("option", expected, argument));
            }
            let value = rest.next().ok_or_else(|| Error::value(format!("--{flag}"), "a value", "nothing"))?;
            flags.push((flag.to_owned(), value.clone()));
        }
        Ok(Self { positional, flags, switches })
    }

    /// The positional arguments, of which there must be as many as names.
    pub fn paths<const N: usize>(&self, names: [&str; N]) -> Result<[PathBuf; N]> {
        <[String; N]>::try_from(self.positional.clone())
            .map(|paths| paths.map(PathBuf::from))
            .map_err(|found| Error::value("arguments", names.join(" "), format!("{} of them", found.len())))
    }

    /// The last value of a flag.
    pub fn get<'a>(&'a self, flag: &'a str) -> Option<&'a str> {
        self.all(flag).last()
    }

    /// Whether a switch is there.
    pub fn has(&self, switch: &str) -> bool {
        self.switches.iter().any(|found| found == switch)
    }

    /// All values of a flag.
    pub fn all<'a>(&'a self, flag: &'a str) -> impl Iterator<Item = &'a str> {
        self.flags.iter().filter(move |(name, _)| name == flag).map(|(_, value)| value.as_str())
    }

    /// `--dtype` and `--device`.
    pub fn placement(&self) -> Result<Placement> {
        let dtype = self.get("dtype").unwrap_or("f32");
        Ok(Placement::new(device(self.get("device").unwrap_or("cpu"))?, kind(dtype)?))
    }

    /// A whole number.
    pub fn number(&self, flag: &str, default: u64) -> Result<u64> {
        match self.get(flag) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| Error::value(format!("--{flag}"), "a number ≥ 0", text)),
        }
    }

    /// A real number, if the flag is there.
    pub fn real(&self, flag: &str) -> Result<Option<f64>> {
        let parse =
            |text: &str| text.parse().map_err(|_| Error::value(format!("--{flag}"), "a number", text));
        self.get(flag).map(parse).transpose()
    }
}
