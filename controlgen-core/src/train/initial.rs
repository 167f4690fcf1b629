//! Parameters of a model that is not there yet.

use tch::{Device, Kind, Tensor};

use crate::checkpoint::{TensorInfo, TensorSource, Weights};
use crate::noise::Noise;
use crate::{Error, Result};

/// How a parameter begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Initial {
    /// All the same.
    Constant(f64),
    /// Uniform in −b .. b.
    Uniform(f64),
    /// Normal, of this deviation.
    Normal(f64),
}

/// A parameter that a model asks for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its name in the checkpoint.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [i64],
    /// The shape of the `weight` that it belongs to; its own if it is one.
    pub weight: &'a [i64],
}

impl Asked<'_> {
    /// How many inputs an output of its layer has: the product of all sizes of the weight but the first.
    pub fn fan_in(&self) -> i64 {
        self.weight.iter().skip(1).product()
    }
}

impl Initial {
    /// PyTorch's own: weights and biases of linear layers and convolutions uniform within 1 / √fan_in (He et al. 2015
    /// with a = √5), norms 1 and 0, tables of embeddings standard normal.
    pub fn torch(asked: &Asked<'_>) -> Self {
        let norm = asked.weight.len() < 2;
        match asked.name.rsplit('.').next() {
            Some("bias") if norm => Self::Constant(0.0),
            Some("weight") if norm => Self::Constant(1.0),
            Some("weight") if asked.shape.len() == 2 && asked.name.contains("embedding.weight") => {
                Self::Normal(1.0)
            }
            _ => Self::Uniform(1.0 / (asked.fan_in().max(1) as f64).sqrt()),
        }
    }
}

/// Nothing: every name is missing.
struct Nothing;

impl TensorSource for Nothing {
    fn what(&self) -> String {
        "a model that is not there yet".into()
    }

    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn info(&self, _name: &str) -> Option<TensorInfo> {
        None
    }

    fn read(&self, name: &str, _into: &mut Tensor) -> Result<()> {
        Err(Error::format(self.what(), format!("no tensor `{name}`")))
    }
}

/// New parameters of all that `load` asks its [`Weights`] for: f32 leaves, in the order of their names. What `load` makes
/// of the zeros that it gets is thrown away.
///
/// Each parameter draws from a stream of its own, so that a change of one layer changes no other.
///
/// ```
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::checkpoint::Weights;
/// use controlgen_core::noise::Noise;
/// use controlgen_core::train::{Initial, Parameters, initial};
/// use tch::{Device, Kind};
///
/// let load = |weights: &Weights<'_>| weights.scope("layer").get("weight", &[3, 4]);
/// let parameters = Parameters::new(initial(Noise::seeded(0), Device::Cpu, Initial::torch, load)?)?;
/// // In each step the model is loaded anew from its parameters, and gradients flow through what it does with them.
/// let weight = load(&Weights::new(&parameters, (Kind::Float, Device::Cpu)))?;
/// let gradients = parameters.gradients(&weight.f_square()?.f_sum(None::<Kind>)?)?;
/// # let _ = gradients;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of `load` but for [`Error::Keys`]; [`Error::Value`] where it asks for nothing.
pub fn initial<M>(
    noise: Noise,
    device: Device,
    rule: impl Fn(&Asked<'_>) -> Initial,
    load: impl FnOnce(&Weights<'_>) -> Result<M>,
) -> Result<Vec<(String, Tensor)>> {
    let weights = Weights::new(&Nothing, (Kind::Float, device));
    match load(&weights) {
        Ok(_) | Err(Error::Keys { .. }) => {}
        Err(error) => return Err(error),
    }
    let all = weights.missing_shapes();
    if all.is_empty() {
        return Err(Error::value("parameters that the model asks for", "one at least", "none"));
    }
    let mut named = Vec::with_capacity(all.len());
    for (number, (name, shape)) in (0_u64..).zip(&all) {
        let weight = name.strip_suffix("bias").map(|layer| format!("{layer}weight"));
        let weight = weight.and_then(|weight| Some(&all.iter().find(|other| other.0 == weight)?.1));
        let asked = Asked { name, shape, weight: weight.unwrap_or(shape) };
        let mut stream = noise.stream(number);
        let value = match rule(&asked) {
            Initial::Constant(value) => Tensor::f_full(shape, value, (Kind::Float, device))?,
            Initial::Normal(deviation) => {
                stream.normal(shape, Kind::Float, device)?.f_mul_scalar(deviation)?
            }
            Initial::Uniform(bound) => {
                let n = shape.iter().product::<i64>();
                let values: Vec<f32> =
                    (0..n).map(|_| (bound * (2.0 * stream.uniform() - 1.0)) as f32).collect();
                Tensor::f_from_slice(&values)?.f_view(shape.as_slice())?.f_to_device(device)?
            }
        };
        named.push((name.clone(), value.set_requires_grad(true)));
    }
    Ok(named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Parameters;

    fn load(weights: &Weights<'_>) -> Result<Tensor> {
        let linear = weights.fused(&[("q.weight", &[2, 16]), ("k.weight", &[3, 16])])?;
        let bias = weights.get("q.bias", &[2])?;
        let _ = weights.get("norm.weight", &[4])?;
        let _ = weights.get("norm.bias", &[4])?;
        let _ = weights.get("token_embedding.weight", &[1000, 4])?;
        weights.finish(&[])?;
        Ok(linear.f_sum(None::<Kind>)?.f_add(&bias.f_sum(None::<Kind>)?)?)
    }

    fn new(seed: u64) -> Parameters {
        let named = initial(Noise::seeded(seed), Device::Cpu, Initial::torch, load).unwrap();
        Parameters::new(named).unwrap()
    }

    #[test]
    fn every_parameter_that_is_asked_for_begins_as_pytorchs() {
        let parameters = new(3);
        let named = parameters.named();
        let of = |name: &str| &named.iter().find(|other| other.0 == name).unwrap().1;
        let names: Vec<&str> = named.iter().map(|named| named.0.as_str()).collect();
        let expected =
            ["k.weight", "norm.bias", "norm.weight", "q.bias", "q.weight", "token_embedding.weight"];
        assert_eq!(names, expected);
        assert_eq!(of("k.weight").size(), [3, 16]);
        for name in ["q.weight", "k.weight", "q.bias"] {
            let most = of(name).abs().max().double_value(&[]);
            assert!(most <= 0.25 && most > 0.1, "{name}: {most}");
        }
        assert!((of("norm.weight") - 1.0).abs().max().double_value(&[]) == 0.0);
        assert!(of("norm.bias").abs().max().double_value(&[]) == 0.0);
        let deviation = of("token_embedding.weight").std(true).double_value(&[]);
        assert!((deviation - 1.0).abs() < 0.05, "{deviation}");
        assert!(named.iter().all(|(_, value)| value.requires_grad()));
        assert!(of("q.weight").equal(&new(3).named()[4].1) && !of("q.weight").equal(&new(4).named()[4].1));
    }

    #[test]
    fn gradients_flow_through_a_load() {
        let parameters = new(0);
        for kind in [Kind::Float, Kind::BFloat16] {
            let sum = load(&Weights::new(&parameters, (kind, Device::Cpu))).unwrap();
            let gradients = parameters.gradients(&sum.to_kind(Kind::Float)).unwrap();
            // q, k (32 + 48 numbers) and q's bias count once each; norms and embeddings are not read.
            assert!((gradients.norm().unwrap() - 82f64.sqrt()).abs() < 1e-5);
        }
        let wrong = |weights: &Weights<'_>| {
            let _ = weights.get("q.weight", &[2, 8])?;
            weights.finish(&[])
        };
        assert!(matches!(
            wrong(&Weights::new(&parameters, (Kind::Float, Device::Cpu))),
            Err(Error::Shape { .. })
        ));
    }

    #[test]
    fn a_model_without_parameters_is_refused() {
        let none = initial(Noise::seeded(0), Device::Cpu, Initial::torch, |_| Ok(()));
        assert!(matches!(none, Err(Error::Value { .. })));
    }
}
