//! The small random UNets that diffusers wrote, and what it was told.

use std::path::{Path, PathBuf};

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{Condition, Denoiser, Parameterisation, Placement};
use controlgen_diffusion::Predicts;
use controlgen_diffusion::models::open_denoiser;
use tch::Tensor;

/// Each with whether it learned a variance.
pub const MODELS: [(&str, bool); 11] = [
    ("unet_ddpm", false),
    ("unet_adm", true),
    ("unet_adm_resize", false),
    ("unet_karlo_sr", false),
    ("unet_sd1", false),
    ("unet_sd2", false),
    ("unet_sd_upscaler", false),
    ("unet_sdxl", false),
    ("unet_if1", true),
    ("unet_if2", true),
    ("unet_karlo_decoder", true),
];

pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn predicts(learned_variance: bool) -> Predicts {
    Predicts { parameterisation: Parameterisation::Epsilon, learned_variance }
}

pub fn open(name: &str, learned_variance: bool, placement: Placement) -> Box<dyn Denoiser> {
    open_denoiser(&folder(name), predicts(learned_variance), placement).unwrap()
}

pub struct Case {
    file: Safetensors,
    /// Channels of a sample.
    channels: i64,
}

impl Case {
    pub fn of(name: &str, model: &dyn Denoiser) -> Self {
        let file = Safetensors::open(folder(name).join("cases.safetensors")).unwrap();
        Self { file, channels: model.spec().channels }
    }

    pub fn get(&self, name: &str) -> Tensor {
        self.file.load(name).unwrap().unwrap()
    }

    /// `[2, C, 8, 12]`
    pub fn x(&self) -> Tensor {
        self.get("sample").narrow(1, 0, self.channels)
    }

    /// What row `row` was told.
    pub fn condition(&self, row: i64) -> Condition {
        let mut features: Vec<(String, Tensor)> = Vec::new();
        for name in self.file.names() {
            let value = self.get(&name).get(row);
            match name.as_str() {
                "timestep" | "output" => {}
                "sample" => {
                    let more = value.size()[0] - self.channels;
                    if more > 0 {
                        features.push(("concat".into(), value.narrow(0, self.channels, more)));
                    }
                }
                "attention_mask" => features.push(("encoder_attention_mask".into(), value)),
                _ => features.push((name, value)),
            }
        }
        match &features[..] {
            [] => Condition::Null,
            [(name, label)] if name == "class_labels" && !label.is_floating_point() => {
                Condition::Class(label.int64_value(&[]))
            }
            _ => Condition::Features(features),
        }
    }

    pub fn conditions(&self) -> Vec<Condition> {
        vec![self.condition(0), self.condition(1)]
    }
}
