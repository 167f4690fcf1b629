//! Convolutions over images that let controls act.

use tch::Tensor;

use crate::{Error, Pass, Result, SiteId, WeightMap};

/// y = W ∗ x + b over two dimensions.
pub struct Conv2d {
    /// `[O, I, kh, kw]`
    weight: Tensor,
    /// `[O]`
    bias: Option<Tensor>,
    stride: i64,
    padding: i64,
    site: SiteId,
}

impl Conv2d {
    /// A convolution of weight `[O, I, kh, kw]` and bias `[O]` at a site, zeros beyond the borders.
    ///
    /// # Errors
    /// [`Error::Shape`] where these disagree; [`Error::Value`] for a stride below 1 or a padding below 0.
    pub fn new(
        weight: Tensor,
        bias: Option<Tensor>,
        (stride, padding): (i64, i64),
        site: SiteId,
    ) -> Result<Self> {
        let &[outputs, _, _, _] = weight.size().as_slice() else {
            return Err(Error::shape("weight of a convolution", "[O, I, kh, kw]", &weight.size()));
        };
        if let Some(bias) = bias.as_ref().filter(|bias| bias.size() != [outputs]) {
            return Err(Error::shape("bias of a convolution", format!("[{outputs}]"), &bias.size()));
        }
        if stride < 1 || padding < 0 {
            let found = format!("{stride}, {padding}");
            return Err(Error::value(
                "stride and padding of a convolution",
                "stride >= 1, padding >= 0",
                found,
            ));
        }
        Ok(Self { weight, bias, stride, padding, site })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            ..*self
        }
    }

    /// The weight, `[O, I, kh, kw]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[B, I, H, W] → [B, O, H', W']`, through the controls.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        if pass.controls.is_none() {
            return self.product(x);
        }
        let x = pass.input(self.site, x.shallow_clone())?;
        let y = self.product(&x)?;
        pass.linear(self.site, &x, y)
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        Ok(x.f_conv2d(&self.weight, self.bias.as_ref(), stride, padding, [1, 1], 1)?)
    }

    /// The layer with the weight and the bias that `f` answers for; the same storage where it answers for none.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight or a bias of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        let mut map = |what: &str, old: &Tensor| -> Result<Tensor> {
            match f(self.site, old)? {
                None => Ok(old.shallow_clone()),
                Some(new) if new.size() != old.size() => {
                    Err(Error::shape(what, format!("{:?}", old.size()), &new.size()))
                }
                Some(new) => Ok(new.f_to_kind(old.f_kind()?)?),
            }
        };
        let weight = map("a mapped weight", &self.weight)?;
        let bias = self.bias.as_ref().map(|bias| map("a mapped bias", bias)).transpose()?;
        Ok(Self { weight, bias, ..*self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{At, Binding, Control, Controls, Dims, SiteKind, SiteMap};
    use tch::kind::FLOAT_CPU;

    /// Multiplies a convolution's output.
    struct Twice;
    impl Control for Twice {
        fn handle(&self) -> Box<dyn Control> {
            Box::new(Self)
        }
        fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
            sites.of_kind(SiteKind::Conv).for_each(|(site, _)| to.at(site, 0));
            Ok(())
        }
        fn linear(&self, _: At<'_>, _: &Tensor, y: Tensor) -> Result<Tensor> {
            Ok(y.f_mul_scalar(2.0)?)
        }
    }

    fn layer() -> (SiteMap, Conv2d) {
        let mut sites = SiteMap::new();
        let site = sites.add("conv", Dims::Conv { inputs: 2, outputs: 3, kernel: [3, 3] });
        let weight = Tensor::arange(54, FLOAT_CPU).view([3, 2, 3, 3]).sin();
        let bias = Tensor::arange(3, FLOAT_CPU).cos();
        (sites, Conv2d::new(weight, Some(bias), (2, 1), site).unwrap())
    }

    #[test]
    fn controls_see_its_output() {
        let (sites, layer) = layer();
        let x = Tensor::arange(50, FLOAT_CPU).view([1, 2, 5, 5]).sin();
        let plain = layer.forward(&x, &Pass::default()).unwrap();
        assert_eq!(plain.size(), [1, 3, 3, 3]);
        // The middle number by hand: nine places of two channels.
        let patch = x.narrow(2, 1, 3).narrow(3, 1, 3);
        let sum = (layer.weight().get(1) * patch.get(0)).sum(tch::Kind::Float).double_value(&[]) + 1f64.cos();
        assert!((plain.double_value(&[0, 1, 1, 1]) - sum).abs() < 1e-5);
        let controls = Controls::bind(&sites, vec![Box::new(Twice)]).unwrap();
        let twice = layer.forward(&x, &Pass::with_controls(&controls)).unwrap();
        assert!(twice.equal(&(plain * 2.0)));
    }

    #[test]
    fn its_weights_are_mapped_or_shared() {
        let (_, layer) = layer();
        let same = layer.map_weights(&mut |_, _| Ok(None)).unwrap();
        assert_eq!(same.weight().data_ptr(), layer.weight().data_ptr());
        let mapped = layer.map_weights(&mut |_, w| Ok((w.dim() == 4).then(|| w * 2.0))).unwrap();
        assert!(mapped.weight().equal(&(layer.weight() * 2.0)));
        let bad = layer.map_weights(&mut |_, w| Ok(Some(w.narrow(0, 0, 1))));
        assert!(matches!(bad, Err(Error::Shape { .. })));
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let mut sites = SiteMap::new();
        let site = sites.add("conv", Dims::Conv { inputs: 2, outputs: 3, kernel: [3, 3] });
        let w = || Tensor::zeros([3, 2, 3, 3], FLOAT_CPU);
        assert!(Conv2d::new(w().flatten(2, 3), None, (1, 1), site).is_err());
        assert!(Conv2d::new(w(), Some(Tensor::zeros([2], FLOAT_CPU)), (1, 1), site).is_err());
        assert!(Conv2d::new(w(), None, (0, 1), site).is_err());
    }
}
