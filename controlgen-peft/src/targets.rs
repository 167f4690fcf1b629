//! Which sites an adapter acts at, as PEFT's `target_modules` says it.

use controlgen_core::{Dims, Error, Result, SiteId, SiteKind, SiteMap};
use regex::Regex;
use serde_json::Value;

use crate::fields::Fields;

/// What a model's output product is called: `all-linear` leaves it out.
const OUTPUTS: [&str; 3] = ["lm_head", "embed_out", "output_layer"];

/// Which linear sites an adapter acts at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Names, or their last dotted components: `q_proj`, `mlp.c_proj`. One slice of a fused site is named after it:
    /// `c_attn.q` (an extension: PEFT cannot read it).
    Names(Vec<String>),
    /// A regular expression that matches the whole name. Lookaround and back-references are not supported.
    Pattern(String),
    /// Every linear site but the model's output (`lm_head`). PEFT's `all-linear`.
    AllLinear,
}

impl Targets {
    /// Names or their last dotted components.
    pub fn names<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }

    /// PEFT's field: a list of names, a pattern, or `all-linear`.
    pub(crate) fn read(fields: &Fields, field: &str) -> Result<Option<Self>> {
        match fields.get(field) {
            None => Ok(None),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Ok(Some(Self::AllLinear)),
            Some(Value::String(text)) => Ok(Some(Self::Pattern(text.clone()))),
            Some(_) => Ok(fields.texts(field)?.map(Self::Names)),
        }
    }

    pub(crate) fn write(&self) -> Value {
        match self {
            Self::Names(names) => names.iter().map(String::as_str).collect(),
            Self::Pattern(pattern) => pattern.as_str().into(),
            Self::AllLinear => "all-linear".into(),
        }
    }

    /// The places, in the model's order. If `strict`, every name must be somewhere; else one of them, as in PEFT.
    pub(crate) fn resolve(&self, sites: &SiteMap, strict: bool) -> Result<Vec<Place>> {
        let mut found = Vec::new();
        let mut hits = match self {
            Self::Names(names) => vec![false; names.len()],
            _ => vec![false],
        };
        let matches: Matches<'_> = match self {
            Self::Names(names) => Box::new(|name| names.iter().position(|target| is_suffix(target, name))),
            Self::Pattern(pattern) => {
                let regex = whole(pattern, "target_modules")?;
                Box::new(move |name| regex.is_match(name).then_some(0))
            }
            Self::AllLinear => Box::new(|name| {
                let last = name.rsplit('.').next().unwrap_or(name);
                (!OUTPUTS.contains(&last)).then_some(0)
            }),
        };
        for (site, it) in sites.of_kind(SiteKind::Linear) {
            let Dims::Linear { inputs, outputs } = it.dims else { continue };
            let name = it.name.clone();
            if let Some(hit) = matches(&name) {
                hits[hit] = true;
                found.push(Place { site, name, inputs, outputs, slice: None });
                continue;
            }
            if matches!(self, Self::Names(_)) {
                for slice in &it.slices {
                    let name = format!("{name}.{}", slice.name);
                    let Some(hit) = matches(&name) else { continue };
                    hits[hit] = true;
                    let slice_at = Some((slice.start, slice.len));
                    found.push(Place { site, name, inputs, outputs: slice.len, slice: slice_at });
                }
            }
        }
        let missed = match self {
            Self::Names(names) => {
                names.iter().zip(&hits).find(|(_, hit)| !**hit).map(|(name, _)| name.as_str())
            }
            Self::Pattern(pattern) => Some(pattern.as_str()).filter(|_| found.is_empty()),
            Self::AllLinear => Some("all-linear").filter(|_| found.is_empty()),
        };
        match missed {
            // The error that the map itself makes names what is near.
            Some(missed) if strict || found.is_empty() => match sites.select(SiteKind::Linear, missed) {
                Err(error) => Err(error),
                Ok(_) => Err(no_site(missed)),
            },
            _ if found.is_empty() => Err(no_site("")),
            _ => Ok(found),
        }
    }
}

fn no_site(selector: &str) -> Error {
    Error::NoSite { selector: selector.to_owned(), kind: SiteKind::Linear.name(), near: Vec::new() }
}

/// Which of the targets a name is, if it is one.
type Matches<'a> = Box<dyn Fn(&str) -> Option<usize> + 'a>;

/// A linear site, or one slice of its outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) site: SiteId,
    /// The site's name, followed by the slice's.
    pub(crate) name: String,
    pub(crate) inputs: i64,
    pub(crate) outputs: i64,
    /// The first output and how many.
    pub(crate) slice: Option<(i64, i64)>,
}

impl Place {
    /// The same place in another map.
    pub(crate) fn find_in(&self, sites: &SiteMap) -> Result<SiteId> {
        let suffix = if self.slice.is_some() { self.name.rsplit_once('.') } else { None };
        let name = suffix.map_or(self.name.as_str(), |(name, _)| name);
        let by_id = sites.get(self.site).filter(|it| it.name == name && it.kind() == SiteKind::Linear);
        let found = match by_id {
            Some(it) => Some((self.site, it)),
            None => sites.of_kind(SiteKind::Linear).find(|(_, it)| it.name == name),
        };
        let Some((site, it)) = found else {
            return Err(match sites.select(SiteKind::Linear, name) {
                Err(error) => error,
                Ok(_) => no_site(name),
            });
        };
        let Dims::Linear { inputs, outputs } = it.dims else { return Err(no_site(name)) };
        let fits = match (self.slice, suffix) {
            (Some((start, len)), Some((_, slice))) => {
                it.slices.iter().any(|s| s.name == slice && s.start == start && s.len == len)
            }
            _ => outputs == self.outputs,
        };
        if inputs != self.inputs || !fits {
            let expected = format!("[{}, {}], the adapter's", self.outputs, self.inputs);
            return Err(Error::shape(format!("site {name}"), expected, &[outputs, inputs]));
        }
        Ok(site)
    }
}

/// Whether `target` is the whole name or its last dotted components.
pub(crate) fn is_suffix(target: &str, name: &str) -> bool {
    !target.is_empty() && name.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A regular expression that matches all of a name.
pub(crate) fn whole(pattern: &str, field: &str) -> Result<Regex> {
    compile(&format!("^(?:{pattern})$"), pattern, field)
}

/// A regular expression that matches a name, or its last dotted components, as the keys of `rank_pattern` do.
pub(crate) fn ending(pattern: &str, field: &str) -> Result<Regex> {
    compile(&format!(r"^(?:.*\.)?(?:{pattern})$"), pattern, field)
}

fn compile(anchored: &str, pattern: &str, field: &str) -> Result<Regex> {
    Regex::new(anchored).map_err(|_| {
        let expected = "a regular expression without lookaround and back-references";
        Error::value(field, expected, format!("`{pattern}`"))
    })
}
