//! What a classifier ends with: features to the logits of classes.

use controlgen_core::noise::Noise;
use controlgen_core::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Features x `[.., D]` to logits `[.., K]`: linear, or with one hidden layer,
///
/// ```text
/// z = (x − μ) ⊙ s
/// logits = W z + b,   or   W gelu(V z + c) + b
/// ```
///
/// μ and s come from the data ([`Head::standardise`]) and are not trained. Parameters are f32 leaves, shared by all clones.
pub struct Head {
    inputs: i64,
    hidden: Option<i64>,
    classes: i64,
    /// Names and values, in a stable order.
    parameters: Vec<(&'static str, Tensor)>,
}

/// Shares the parameters.
impl Clone for Head {
    fn clone(&self) -> Self {
        let parameters = self.parameters.iter().map(|(name, value)| (*name, value.shallow_clone()));
        Self { parameters: parameters.collect(), ..*self }
    }
}

impl Head {
    /// A head of D = `inputs`, so many hidden units (`None`: linear), and K = `classes` whose answer is the same for every x
    /// until it is trained: W and b are 0, V and c are drawn from U(−1/√D, 1/√D) by the seed.
    ///
    /// # Errors
    /// [`Error::Value`] for no inputs, no hidden units, or fewer than two classes.
    pub fn new(inputs: i64, hidden: Option<i64>, classes: usize, seed: u64) -> Result<Self> {
        if inputs < 1 {
            return Err(Error::value("inputs of a head", "≥ 1", inputs));
        }
        if let Some(hidden) = hidden.filter(|&hidden| hidden < 1) {
            return Err(Error::value("hidden units of a head", "≥ 1", hidden));
        }
        if classes < 2 {
            return Err(Error::value("classes of a head", "≥ 2", classes));
        }
        let classes = classes as i64;
        let zeros = |shape: &[i64]| Tensor::f_zeros(shape, (Kind::Float, Device::Cpu));
        let mut parameters = vec![
            ("mean", zeros(&[inputs])?),
            ("scale", Tensor::f_ones([inputs], (Kind::Float, Device::Cpu))?),
        ];
        if let Some(hidden) = hidden {
            parameters.push(("hidden.weight", uniform(&[hidden, inputs], inputs, seed, 0)?));
            parameters.push(("hidden.bias", uniform(&[hidden], inputs, seed, 1)?));
        }
        parameters.push(("output.weight", zeros(&[classes, hidden.unwrap_or(inputs)])?));
        parameters.push(("output.bias", zeros(&[classes])?));
        for (name, value) in &mut parameters {
            *value = value.f_set_requires_grad(!FIXED.contains(name))?;
        }
        Ok(Self { inputs, hidden, classes, parameters })
    }

    /// D.
    pub fn inputs(&self) -> i64 {
        self.inputs
    }

    /// How many hidden units there are; `None` for a linear head.
    pub fn hidden(&self) -> Option<i64> {
        self.hidden
    }

    /// Sets μ and s from features `[N, D]`, so that each z has mean 0 and variance 1 over them; s is 1 for a feature that does
    /// not vary.
    ///
    /// # Errors
    /// [`Error::Shape`] for other features, or fewer than two rows; [`Error::NotFinite`].
    pub fn standardise(&self, features: &Tensor) -> Result<()> {
        let _no_gradients = tch::no_grad_guard();
        match features.size()[..] {
            [rows, width] if rows > 1 && width == self.inputs => {}
            _ => {
                let expected = format!("[N > 1, {}]", self.inputs);
                return Err(Error::shape("features", expected, &features.size()));
            }
        }
        let features = features.f_to_kind(Kind::Double)?;
        let deviation = features.f_std_dim(&[0i64][..], false, false)?;
        if deviation.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            let (what, at) = ("features".into(), "a row".into());
            return Err(Error::NotFinite { what, at, found: "NaN or infinity".into() });
        }
        let scale =
            deviation.f_clamp_min(1e-12)?.f_reciprocal()?.f_masked_fill(&deviation.f_lt(1e-12)?, 1.0)?;
        self.value("mean")?.f_copy_(&features.f_mean_dim(0i64, false, Kind::Double)?)?;
        self.value("scale")?.f_copy_(&scale)?;
        Ok(())
    }

    /// The logits `[.., K]`, f32, of features `[.., D]` of any floating-point type.
    ///
    /// # Errors
    /// [`Error::Shape`] for another width.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        if x.size().last() != Some(&self.inputs) {
            return Err(Error::shape("features of a head", format!("[.., {}]", self.inputs), &x.size()));
        }
        let device = x.device();
        let get = |name| self.value(name)?.f_to_device(device).map_err(Error::from);
        let mut z = x.f_to_kind(Kind::Float)?.f_sub(&get("mean")?)?.f_mul(&get("scale")?)?; // (.., D)
        if self.hidden.is_some() {
            z = z.f_linear(&get("hidden.weight")?, Some(&get("hidden.bias")?))?.f_gelu("none")?; // (.., H)
        }
        Ok(z.f_linear(&get("output.weight")?, Some(&get("output.bias")?))?) // (.., K)
    }

    /// Names and values of what is trained and of μ and s, which are not: handles over the head's own storage.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.parameters.iter().map(|(name, value)| ((*name).to_owned(), value.shallow_clone())).collect()
    }

    /// How many classes there are.
    pub fn classes(&self) -> i64 {
        self.classes
    }

    fn value(&self, name: &str) -> Result<Tensor> {
        let found = self.parameters.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| value.shallow_clone()).ok_or_else(|| Error::Keys {
            what: "a head".into(),
            missing: vec![name.to_owned()],
            unexpected: Vec::new(),
        })
    }
}

/// What training leaves alone.
const FIXED: [&str; 2] = ["mean", "scale"];

/// U(−1/√n, 1/√n), by its own stream of the seed.
pub(super) fn uniform(shape: &[i64], n: i64, seed: u64, stream: u64) -> Result<Tensor> {
    let bound = 1.0 / (n.max(1) as f64).sqrt();
    let count = usize::try_from(shape.iter().product::<i64>()).unwrap_or(0);
    let mut stream = Noise::seeded(seed).stream(stream);
    let values: Vec<f32> = (0..count).map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32).collect();
    Ok(Tensor::f_from_slice(&values)?.f_view(shape)?)
}
