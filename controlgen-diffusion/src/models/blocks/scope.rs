//! Weights and sites below one path.

use controlgen_core::checkpoint::Weights;
use controlgen_core::layers::{Conv2d, Embedding, GroupNorm, LayerNorm, Linear};
use controlgen_core::{Dims, Result, Site, SiteId, SiteMap};
use tch::Tensor;

use super::channels_last;

/// What projections of attentions were once called, by their new names.
const OLD_NAMES: [(&str, &str); 4] =
    [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];

/// Where a module is loaded: the weights below its path, and the map that its sites go into, under the same path.
pub struct Scope<'a, 's> {
    weights: Weights<'a>,
    sites: &'s mut SiteMap,
    path: String,
    kohya: Option<&'static str>,
}

impl<'a, 's> Scope<'a, 's> {
    /// The root of a model. Sites of products get a second name as kohya's LoRA files write it, `kohya` and the path
    /// joined by underscores, where there is such a prefix: `lora_unet`.
    pub fn new(weights: &Weights<'a>, sites: &'s mut SiteMap, kohya: Option<&'static str>) -> Self {
        Self { weights: weights.clone(), sites, path: String::new(), kohya }
    }

    /// What is below `name`.
    pub fn below(&mut self, name: impl AsRef<str>) -> Scope<'a, '_> {
        let name = name.as_ref();
        let path = self.path(name);
        Scope { weights: self.weights.scope(name), sites: self.sites, path, kohya: self.kohya }
    }

    /// The weights of this path.
    pub fn weights(&self) -> &Weights<'a> {
        &self.weights
    }

    fn path(&self, name: &str) -> String {
        match (self.path.as_str(), name) {
            ("", name) => name.to_owned(),
            (path, "") => path.to_owned(),
            (path, name) => format!("{path}.{name}"),
        }
    }

    /// A site at this path, or below it.
    pub fn site(&mut self, name: &str, dims: Dims) -> SiteId {
        let mut aliases = Vec::new();
        let path = self.path(name);
        if let (Some(prefix), Dims::Linear { .. } | Dims::Conv { .. }) = (self.kohya, dims) {
            aliases.push(format!("{prefix}_{}", path.replace('.', "_")));
        }
        if let Some((_, old)) = OLD_NAMES.iter().find(|names| names.0 == name) {
            aliases.push(self.path(old));
        }
        self.sites.add_site(Site { name: path, aliases, dims, slices: Vec::new() })
    }

    /// The site of this module's residual branch, `width` channels wide.
    pub fn branch(&mut self, name: &str, width: i64) -> SiteId {
        self.site(name, Dims::Hidden { width })
    }

    /// The name that the checkpoint has for a projection.
    fn present(&self, name: &str) -> String {
        let there = |name: &str| self.weights.find(&format!("{name}.weight")).is_some();
        match OLD_NAMES.iter().find(|names| names.0 == name) {
            Some((_, old)) if !there(name) && there(old) => (*old).to_owned(),
            _ => name.to_owned(),
        }
    }

    /// A linear layer below this path.
    ///
    /// # Errors
    /// Those of [`Weights::get`].
    pub fn linear(&mut self, name: &str, (inputs, outputs): (i64, i64), bias: bool) -> Result<Linear> {
        let site = self.site(name, Dims::Linear { inputs, outputs });
        let name = self.present(name);
        let weight = self.weights.get(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = bias.then(|| self.weights.get(&format!("{name}.bias"), &[outputs])).transpose()?;
        Linear::new(weight, bias, &[(site, outputs)])
    }

    /// Linear layers of the same input as one product, each `(inputs, outputs)`.
    ///
    /// # Errors
    /// Those of [`Weights::fused`].
    pub fn fused(&mut self, names: &[&str], (inputs, outputs): (i64, i64), bias: bool) -> Result<Linear> {
        let parts: Vec<(SiteId, i64)> =
            names.iter().map(|name| (self.site(name, Dims::Linear { inputs, outputs }), outputs)).collect();
        let names: Vec<String> = names.iter().map(|name| self.present(name)).collect();
        let read = |what: &str, shape: &[i64]| -> Result<Tensor> {
            let names: Vec<String> = names.iter().map(|name| format!("{name}.{what}")).collect();
            let parts: Vec<(&str, &[i64])> = names.iter().map(|name| (name.as_str(), shape)).collect();
            self.weights.fused(&parts)
        };
        let weight = read("weight", &[outputs, inputs])?;
        let bias = bias.then(|| read("bias", &[outputs])).transpose()?;
        Linear::new(weight, bias, &parts)
    }

    /// A convolution below this path, of a square kernel: stride and padding.
    ///
    /// # Errors
    /// Those of [`Weights::get`].
    pub fn conv(
        &mut self,
        name: &str,
        (inputs, outputs): (i64, i64),
        kernel: i64,
        (stride, padding): (i64, i64),
    ) -> Result<Conv2d> {
        let site = self.site(name, Dims::Conv { inputs, outputs, kernel: [kernel, kernel] });
        let found = format!("{name}.weight");
        let mut weight = self.weights.get(&found, &[outputs, inputs, kernel, kernel])?;
        // What stands in for a weight that is missing is to take no memory.
        if self.weights.find(&found).is_some() {
            weight = channels_last(&weight)?;
        }
        let bias = self.weights.get(&format!("{name}.bias"), &[outputs])?;
        Conv2d::new(weight, Some(bias), (stride, padding), site)
    }

    /// A group norm below this path.
    ///
    /// # Errors
    /// Those of [`Weights::get`]; [`Error::Value`](controlgen_core::Error::Value) where the groups do not divide the
    /// channels.
    pub fn group_norm(&self, name: &str, (groups, channels): (i64, i64), eps: f64) -> Result<GroupNorm> {
        let weight = self.weights.get(&format!("{name}.weight"), &[channels])?;
        let bias = self.weights.get(&format!("{name}.bias"), &[channels])?;
        GroupNorm::new(groups, weight, bias, eps)
    }

    /// A layer norm below this path, with ε = 1e-5.
    ///
    /// # Errors
    /// Those of [`Weights::get`].
    pub fn layer_norm(&self, name: &str, width: i64) -> Result<LayerNorm> {
        let weight = self.weights.get(&format!("{name}.weight"), &[width])?;
        let bias = self.weights.get(&format!("{name}.bias"), &[width])?;
        Ok(LayerNorm::new(weight, Some(bias), 1e-5))
    }

    /// A table of embeddings below this path.
    ///
    /// # Errors
    /// Those of [`Weights::get`].
    pub fn embedding(&mut self, name: &str, (rows, width): (i64, i64)) -> Result<Embedding> {
        let site = self.site(name, Dims::Embedding { rows, width });
        Ok(Embedding::new(self.weights.get(&format!("{name}.weight"), &[rows, width])?, site))
    }
}
