//! Activation functions, by the names that configuration files give them.

use tch::Tensor;

use crate::{Error, Result, is_recording};

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x σ(x) (Hendrycks & Gimpel 2016; Elfwing et al. 2017)
    Silu,
    /// x Φ(x) (Hendrycks & Gimpel 2016)
    Gelu,
    /// The approximation of x Φ(x) by tanh that GPT-2 uses.
    GeluTanh,
    /// x σ(1.702 x), as CLIP uses.
    QuickGelu,
    /// tanh(x)
    Tanh,
}

impl Activation {
    /// The function of a name: `relu`, `silu`, `swish`, `gelu`, `gelu_new`, `gelu_pytorch_tanh`, `gelu_fast`,
    /// `quick_gelu`, `tanh`.
    ///
    /// # Errors
    /// [`Error::Value`] for another name.
    pub fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "relu" => Self::Relu,
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "quick_gelu" => Self::QuickGelu,
            "tanh" => Self::Tanh,
            _ => {
                let known =
                    "relu, silu, swish, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, quick_gelu or tanh";
                return Err(Error::value("activation", known, name));
            }
        })
    }

    /// Applies it to each element.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Relu => x.f_relu()?,
            Self::Silu => x.f_silu()?,
            Self::Gelu => x.f_gelu("none")?,
            Self::GeluTanh => x.f_gelu("tanh")?,
            Self::QuickGelu => x.f_mul_scalar(1.702)?.f_sigmoid()?.f_mul(x)?,
            Self::Tanh => x.f_tanh()?,
        })
    }

    /// The same of a tensor that nobody else holds: in its place, where no graph is recorded.
    ///
    /// # Errors
    /// Those of LibTorch.
    pub fn consume(self, mut x: Tensor) -> Result<Tensor> {
        if is_recording() {
            return self.forward(&x);
        }
        Ok(match self {
            Self::Relu => x.f_relu_()?,
            Self::Silu => x.f_silu_()?,
            Self::Gelu => x.f_gelu_("none")?,
            Self::GeluTanh => x.f_gelu_("tanh")?,
            Self::QuickGelu => self.forward(&x)?,
            Self::Tanh => x.f_tanh_()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        // From the definitions, at x = 1.
        for (name, expected) in [
            ("relu", 1.0),
            ("silu", 0.731_058_6),
            ("gelu", 0.841_344_7),
            ("gelu_new", 0.841_192),
            ("quick_gelu", 0.845_795_8),
            ("tanh", 0.761_594_2),
        ] {
            let y = Activation::from_name(name).unwrap().forward(&Tensor::from(1.0f32)).unwrap();
            assert!((y.double_value(&[]) - expected).abs() < 1e-6, "{name}: {y:?}");
            let act = Activation::from_name(name).unwrap();
            let x = Tensor::from(1.0f32).set_requires_grad(true);
            assert!(act.consume(&x * 1.0).unwrap().requires_grad(), "{name}: a graph");
            let _no_gradients = tch::no_grad_guard();
            let x = Tensor::from(1.0f32);
            assert!(act.consume(x).unwrap().equal(&y), "{name}: in place");
        }
        assert!(Activation::from_name("gleu").is_err());
    }
}
