//! The configuration of LoRA, in PEFT's fields.

use controlgen_core::{Error, Result};
use regex::Regex;
use serde_json::{Map, Value, json};

use crate::fields::{Fields, object};
use crate::targets::{Place, Targets, ending};

pub(crate) const TYPE: &str = "LORA";

/// Fields of PEFT's that change the result, and what is done here.
const UNSUPPORTED: [&str; 19] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "exclude_modules",
    "layers_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "corda_config",
    "lora_ga_config",
    "ensure_weight_tying",
    "megatron_config",
];
const SUPPORTED: &str = "plain LoRA: A and B at linear sites";
/// Initialisations after which the base weights are what they were.
const INITIAL: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// What a LoRA is, in the names of PEFT.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// r, the rank of the change: at least 1.
    pub r: i64,
    /// α: the change is scaled by α/r.
    pub lora_alpha: f64,
    /// Scales by α/√r instead (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Where it acts.
    pub target_modules: Targets,
    /// Other ranks for some sites: the first pair whose pattern matches the end of a name, from a dot or the start on.
    pub rank_pattern: Vec<(String, i64)>,
    /// Other α for some sites, likewise.
    pub alpha_pattern: Vec<(String, f64)>,
    /// The layers it acts in, by the first number in a name from its third component on; all where empty. It applies
    /// to targets by name, other than whole names.
    pub layers_to_transform: Vec<i64>,
    /// Whether the model keeps these weights transposed (GPT-2). It changes nothing here; PEFT wants to know.
    pub fan_in_fan_out: bool,
    /// The model it was made for, as PEFT's file names it.
    pub base_model: Option<String>,
    /// PEFT's `task_type`.
    pub task_type: Option<String>,
}

impl Default for LoraConfig {
    /// PEFT's: r = α = 8, at every linear site but the output.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            target_modules: Targets::AllLinear,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: Vec::new(),
            fan_in_fan_out: false,
            base_model: None,
            task_type: Some("CAUSAL_LM".into()),
        }
    }
}

impl LoraConfig {
    pub(crate) fn read(fields: &Fields) -> Result<Self> {
        fields.refuse(&UNSUPPORTED, SUPPORTED)?;
        if let Some(bias) = fields.text("bias")?.filter(|bias| bias != "none") {
            return Err(Error::unsupported(format!("LoRA with bias `{bias}`"), "bias `none`"));
        }
        match fields.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => {}
            Some(Value::String(name)) if INITIAL.contains(&name.as_str()) => {}
            Some(other) => {
                let what = format!("init_lora_weights {other}, which changes the model's own weights,");
                return Err(Error::unsupported(what, format!("true, false, {}", INITIAL.join(", "))));
            }
        }
        let layers = "a whole number >= 0, or a list of them";
        let layers_to_transform = match fields.get("layers_to_transform") {
            None => Vec::new(),
            Some(value) => {
                let one = value.as_i64().map(|layer| vec![layer]);
                let all = || value.as_array()?.iter().map(Value::as_i64).collect();
                one.or_else(all).ok_or_else(|| fields.error("layers_to_transform", layers, value))?
            }
        };
        let default = Self::default();
        let config = Self {
            r: fields.count("r")?.unwrap_or(default.r),
            lora_alpha: fields.number("lora_alpha")?.unwrap_or(default.lora_alpha),
            use_rslora: fields.flag("use_rslora")?,
            target_modules: Targets::read(fields, "target_modules")?.ok_or_else(|| {
                fields.error("target_modules", "names, a pattern or `all-linear`", &Value::Null)
            })?,
            rank_pattern: fields.members("rank_pattern", "whole numbers > 0 by pattern", |value| {
                value.as_i64().filter(|&rank| rank > 0)
            })?,
            alpha_pattern: fields.members("alpha_pattern", "numbers by pattern", Value::as_f64)?,
            layers_to_transform,
            fan_in_fan_out: fields.flag("fan_in_fan_out")?,
            base_model: fields.text("base_model_name_or_path")?,
            task_type: fields.text("task_type")?,
        };
        config.validate()?;
        Ok(config)
    }

    pub(crate) fn write(&self) -> Map<String, Value> {
        let whole = |alpha: f64| if alpha.fract() == 0.0 { json!(alpha as i64) } else { json!(alpha) };
        let layers = Some(&self.layers_to_transform).filter(|layers| !layers.is_empty());
        let ranks: Map<_, _> = self.rank_pattern.iter().map(|(key, r)| (key.clone(), json!(r))).collect();
        let alphas: Map<_, _> = self.alpha_pattern.iter().map(|(key, a)| (key.clone(), whole(*a))).collect();
        object([
            ("peft_type", json!(TYPE)),
            ("task_type", json!(self.task_type)),
            ("base_model_name_or_path", json!(self.base_model)),
            ("inference_mode", json!(true)),
            ("r", json!(self.r)),
            ("lora_alpha", whole(self.lora_alpha)),
            ("lora_dropout", json!(0.0)),
            ("use_rslora", json!(self.use_rslora)),
            ("use_dora", json!(false)),
            ("bias", json!("none")),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("target_modules", self.target_modules.write()),
            ("rank_pattern", Value::Object(ranks)),
            ("alpha_pattern", Value::Object(alphas)),
            ("layers_to_transform", json!(layers)),
            ("modules_to_save", Value::Null),
        ])
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let all = self.rank_pattern.iter().map(|(_, r)| *r).chain([self.r]);
        if let Some(r) = all.into_iter().find(|&r| r < 1) {
            return Err(Error::value("LoRA's rank r", ">= 1", r));
        }
        let mut alphas = self.alpha_pattern.iter().map(|(_, a)| *a).chain([self.lora_alpha]);
        if let Some(alpha) = alphas.find(|alpha| !alpha.is_finite()) {
            return Err(Error::value("LoRA's lora_alpha", "a finite number", alpha));
        }
        Ok(())
    }

    /// What tells ranks and scales by name.
    pub(crate) fn ranks(&self) -> Result<Ranks<'_>> {
        fn compiled<'c, T>(pairs: &'c [(String, T)], field: &str) -> Result<Vec<(Regex, &'c T)>> {
            pairs.iter().map(|(pattern, value)| Ok((ending(pattern, field)?, value))).collect()
        }
        Ok(Ranks {
            config: self,
            ranks: compiled(&self.rank_pattern, "rank_pattern")?,
            alphas: compiled(&self.alpha_pattern, "alpha_pattern")?,
        })
    }

    /// Leaves the places that are in other layers out.
    pub(crate) fn in_layers(&self, mut places: Vec<Place>) -> Vec<Place> {
        if let (Targets::Names(names), false) = (&self.target_modules, self.layers_to_transform.is_empty()) {
            places.retain(|place| {
                names.contains(&place.name)
                    || layer(&place.name).is_some_and(|layer| self.layers_to_transform.contains(&layer))
            });
        }
        places
    }
}

/// The first component of digits alone, from the third on and not the last.
fn layer(name: &str) -> Option<i64> {
    let parts: Vec<&str> = name.split('.').collect();
    let inner = parts.get(2..parts.len().saturating_sub(1))?;
    inner.iter().find(|part| part.bytes().all(|b| b.is_ascii_digit()) && !part.is_empty())?.parse().ok()
}

pub(crate) struct Ranks<'c> {
    config: &'c LoraConfig,
    ranks: Vec<(Regex, &'c i64)>,
    alphas: Vec<(Regex, &'c f64)>,
}

impl Ranks<'_> {
    /// The rank at a site, and the scale.
    pub(crate) fn of(&self, name: &str) -> (i64, f64) {
        fn first<T: Copy>(pairs: &[(Regex, &T)], name: &str) -> Option<T> {
            pairs.iter().find(|(pattern, _)| pattern.is_match(name)).map(|(_, value)| **value)
        }
        let r = first(&self.ranks, name).unwrap_or(self.config.r);
        let alpha = first(&self.alphas, name).unwrap_or(self.config.lora_alpha);
        let under = if self.config.use_rslora { (r as f64).sqrt() } else { r as f64 };
        (r, alpha / under)
    }
}
