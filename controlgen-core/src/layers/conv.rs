//! Convolutions over images that let controls act.

use tch::{Device, Kind, Tensor};

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

    /// The convolution of x with every place repeated 2 × 2 times (nearest neighbour):
    /// `[B, I, H, W] → [B, O, 2 H, 2 W]`, through the controls. x may best lie channels last in memory.
    ///
    /// Of the nine products a place, those that read the same place of x are one: 3 × 3 over four times the places is
    /// 2 × 2 over x itself for each of the four, which is 4/9 of the multiplications. So it is done on the CPU.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward_upsampled(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (_, _, h, w) = x.size4()?;
        let repeated = || x.f_upsample_nearest2d([2 * h, 2 * w], 2.0, 2.0);
        let (_, _, kh, kw) = self.weight.size4()?;
        let small = [kh, kw, self.stride, self.padding] == [3, 3, 1, 1] && x.device() == Device::Cpu;
        if !small || !matches!(x.f_kind()?, Kind::Float | Kind::Double) || pass.acts_before(self.site) {
            return self.forward(&repeated()?, pass);
        }
        let y = self.four(x)?;
        if pass.acts_at(self.site) { pass.linear(self.site, &repeated()?, y) } else { Ok(y) }
    }

    /// W ∗ up(x) + b for W of 3 × 3, as one convolution of 2 × 2 with four times the outputs.
    fn four(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, h, w) = x.size4()?;
        let outputs = self.weight.size4()?.0;
        // Even places see (x₋₁, x₀, x₀), odd ones (x₀, x₀, x₁).
        let halved = |k: &Tensor, dim: i64, odd: bool| -> Result<Tensor> {
            let at = |i| k.f_select(dim, i);
            let pair = if odd { [at(0)?.f_add(&at(1)?)?, at(2)?] } else { [at(0)?, at(1)?.f_add(&at(2)?)?] };
            Ok(Tensor::f_stack(&pair, dim)?)
        };
        let kernel = self.weight.f_permute([0, 2, 3, 1])?; // (O, 3, 3, I)
        let mut kernels = Vec::with_capacity(4);
        for row in [false, true] {
            let rows = halved(&kernel, 1, row)?;
            for column in [false, true] {
                kernels.push(halved(&rows, 2, column)?); // (O, 2, 2, I)
            }
        }
        let kernels = Tensor::f_cat(&kernels, 0)?.f_permute([0, 3, 1, 2])?; // (4 O, I, 2, 2)
        let bias = self.bias.as_ref().map(|bias| bias.f_repeat([4])).transpose()?;
        let y = x.f_conv2d(&kernels, bias.as_ref(), [1, 1], [1, 1], [1, 1], 1)?; // (B, 4 O, H + 1, W + 1)
        let out = Tensor::f_empty([b, h, 2, w, 2, outputs], (y.f_kind()?, y.device()))?;
        for (n, (row, column)) in [(0, 0), (0, 1), (1, 0), (1, 1)].into_iter().enumerate() {
            let part = y.f_narrow(1, i64::try_from(n).unwrap_or(0) * outputs, outputs)?;
            let part = part.f_narrow(2, row, h)?.f_narrow(3, column, w)?.f_permute([0, 2, 3, 1])?;
            out.f_select(4, column)?.f_select(2, row)?.f_copy_(&part)?; // (B, H, W, O)
        }
        Ok(out.f_view([b, 2 * h, 2 * w, outputs])?.f_permute([0, 3, 1, 2])?)
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
    fn of_repeated_places_it_is_the_same_convolution() {
        let mut sites = SiteMap::new();
        let site = sites.add("conv", Dims::Conv { inputs: 3, outputs: 2, kernel: [3, 3] });
        let options = (Kind::Double, Device::Cpu);
        let weight = Tensor::arange(54, options).view([2, 3, 3, 3]).sin();
        let layer = Conv2d::new(weight, Some(Tensor::arange(2, options).cos()), (1, 1), site).unwrap();
        let x = Tensor::arange(2 * 3 * 4 * 5, options).view([2, 3, 4, 5]).sin().set_requires_grad(true);
        let plain = layer.forward(&x.upsample_nearest2d([8, 10], 2.0, 2.0), &Pass::default()).unwrap();
        let found = layer.forward_upsampled(&x, &Pass::default()).unwrap();
        assert!(found.size() == [2, 2, 8, 10] && found.allclose(&plain, 1e-12, 1e-12, false));
        let gradient = |y: &Tensor| Tensor::run_backward(&[(y * y).sum(Kind::Double)], &[&x], false, false);
        assert!(gradient(&found)[0].allclose(&gradient(&plain)[0], 1e-11, 1e-11, false));
        let controls = Controls::bind(&sites, vec![Box::new(Twice)]).unwrap();
        let twice = layer.forward_upsampled(&x, &Pass::with_controls(&controls)).unwrap();
        assert!(twice.equal(&(found * 2.0)));
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
