//! A denoiser with self- and cross-attention, small enough to compute its maps.

use std::sync::Arc;

use controlgen_core::{
    Attn, Condition, Denoiser, DenoiserSpec, Dims, Mask, NoiseLevel, Parameterisation, Pass, Placement,
    Prediction, Prepared, Result, SiteId, SiteMap, WeightMap,
};
use tch::{Kind, Tensor, kind::FLOAT_CPU};

/// Width, positions, text tokens, heads of queries and width of a head.
pub const D: i64 = 12;
pub const P: i64 = 6;
pub const N: i64 = 5;
const HEADS: i64 = 4;
const HEAD: i64 = 3;

/// Two blocks of self-attention (`attn1`) and cross-attention (`attn2`), the second with two queries a key.
pub struct Toy {
    spec: DenoiserSpec,
    pub sites: Arc<SiteMap>,
    /// self, cross, of each block
    attention: Vec<[SiteId; 2]>,
    kv_heads: Vec<i64>,
}

/// Numbers in −1 .. 1 that look random.
pub fn noise(shape: &[i64], salt: f64) -> Tensor {
    let n: i64 = shape.iter().product();
    ((Tensor::arange(n, (Kind::Double, tch::Device::Cpu)) * 12.9898 + salt).sin() * 43758.5453)
        .frac()
        .view(shape)
        .to_kind(Kind::Float)
}

/// How attention is computed.
pub type Attend<'a> = dyn Fn(SiteId, Attn) -> Result<Tensor> + 'a;

impl Toy {
    pub fn new() -> Self {
        let mut sites = SiteMap::new();
        let kv_heads = vec![HEADS, 2];
        let mut attention = Vec::new();
        for (i, &kv_heads) in kv_heads.iter().enumerate() {
            let mut site = |name, cross| {
                let dims = Dims::Attention { heads: HEADS, kv_heads, head_dim: HEAD, cross };
                sites.add(format!("blocks.{i}.{name}"), dims)
            };
            attention.push([site("attn1", false), site("attn2", true)]);
        }
        let spec = DenoiserSpec {
            architecture: "toy".into(),
            channels: D,
            size: [1, P],
            multiple: 1,
            parameterisation: Parameterisation::Epsilon,
            learned_variance: false,
            placement: Placement::CPU,
        };
        Self { spec, sites: sites.into(), attention, kv_heads }
    }

    /// x `[B, P, D]`, text `[B, N, D]`, keep `[B, N]`.
    pub fn run(&self, x: &Tensor, text: &Tensor, keep: &Tensor, attend: &Attend<'_>) -> Tensor {
        let (mut x, kind) = (x.shallow_clone(), x.kind());
        let noise = |shape: &[i64], salt: f64| noise(shape, salt).to_kind(kind);
        let text = text.to_kind(kind);
        for (i, sites) in self.attention.iter().enumerate() {
            for (j, site) in sites.iter().enumerate() {
                let salt = (10 * i + j) as f64;
                let kv = self.kv_heads[i];
                let of = if j == 0 { &x } else { &text };
                let split = |t: &Tensor, heads: i64, salt: f64| {
                    let w = noise(&[D, heads * HEAD], salt) * 1.5;
                    t.matmul(&w).view([t.size()[0], -1, heads, HEAD]).transpose(1, 2)
                };
                let (k, v) = (split(of, kv, salt + 0.2), split(of, kv, salt + 0.3));
                let q = split(&x, HEADS, salt + 0.1);
                let mask = match (i, j) {
                    (0, 0) => Mask::Causal,
                    (_, 0) => Mask::Bias(noise(&[P, P], salt + 0.5)),
                    (0, _) => Mask::Keep(keep.view([-1, 1, 1, N])),
                    // A row's own, as a mask of added numbers.
                    _ => Mask::Bias(
                        (keep.logical_not().to_kind(kind) * -1e4 + noise(&[1, N], salt)).view([-1, 1, 1, N]),
                    ),
                };
                let a = attend(*site, Attn { q, k, v, mask, scale: (j == 1).then_some(0.8) }).unwrap();
                let a = a.transpose(1, 2).reshape([x.size()[0], P, HEADS * HEAD]);
                x = &x + a.matmul(&noise(&[HEADS * HEAD, D], salt + 0.4)) * 0.5;
            }
        }
        x
    }

    pub fn handle(&self) -> Self {
        Self {
            spec: self.spec.clone(),
            sites: self.sites.clone(),
            attention: self.attention.clone(),
            kv_heads: self.kv_heads.clone(),
        }
    }
}

/// `[B, D, 1, P]` to `[B, P, D]`.
pub fn positions(x: &Tensor) -> Tensor {
    x.squeeze_dim(2).transpose(1, 2)
}

/// The text of a prompt by its number: `[N, D]`, and which tokens are no padding, `[N]`.
pub fn prompt(number: i64) -> (Tensor, Tensor) {
    let length = N - number % 3;
    (noise(&[N, D], 100.0 + number as f64), Tensor::arange(N, FLOAT_CPU).lt(length as f64))
}

impl Denoiser for Toy {
    fn handle(&self) -> Box<dyn Denoiser> {
        Box::new(self.handle())
    }
    fn spec(&self) -> &DenoiserSpec {
        &self.spec
    }
    fn sites(&self) -> &SiteMap {
        &self.sites
    }
    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared> {
        let prompts = conditions.iter().map(|condition| match condition {
            Condition::Class(number) => prompt(1 + number),
            _ => prompt(0),
        });
        let (text, keep): (Vec<_>, Vec<_>) = prompts.unzip();
        let tensors = vec![Tensor::stack(&text, 0), Tensor::stack(&keep, 0)];
        Prepared::new(&self.sites, pass, conditions.len() as i64, tensors)
    }
    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        prepared.check(&self.sites, pass)?;
        let batch = self.spec.validate(x, t, prepared)?;
        pass.check(&self.sites, batch)?;
        let [text, keep] = prepared.tensors() else { unreachable!() };
        let y = self.run(&positions(x), text, keep, &|site, attn| pass.attention(site, attn));
        Ok(Prediction::new(y.transpose(1, 2).unsqueeze(2).contiguous(), Parameterisation::Epsilon))
    }
    fn map_weights(&self, _: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        Ok(Box::new(self.handle()))
    }
}

/// softmax(q kᵀ · scale + mask), `[B, heads, Tq, Tk]`, and v `[B, heads, Tk, d]`, in f64.
pub fn map(a: &Attn) -> (Tensor, Tensor) {
    let double = |t: &Tensor| t.to_kind(Kind::Double);
    let (heads, kv) = (a.q.size()[1], a.k.size()[1]);
    let repeat = |t: &Tensor| double(t).repeat_interleave_self_int(heads.div_euclid(kv), 1, None);
    let (tq, tk, d) = (a.q.size()[2], a.k.size()[2], a.q.size()[3]);
    let scores =
        double(&a.q).matmul(&repeat(&a.k).transpose(2, 3)) * a.scale.unwrap_or(1.0 / (d as f64).sqrt());
    let scores = match &a.mask {
        Mask::Full => scores,
        Mask::Causal => {
            let keep = Tensor::ones([tq, tk], (Kind::Bool, tch::Device::Cpu)).tril(tk - tq);
            scores.masked_fill(&keep.logical_not(), f64::NEG_INFINITY)
        }
        Mask::Keep(keep) => scores.masked_fill(&keep.logical_not(), f64::NEG_INFINITY),
        Mask::Bias(bias) => scores + double(bias),
    };
    (scores.softmax(-1, None), repeat(&a.v))
}

pub fn level() -> NoiseLevel {
    NoiseLevel::from_alpha_bar(0.4).unwrap()
}
