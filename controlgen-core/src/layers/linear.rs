//! Matrix products, plain or fused, that let controls act at each part.

use tch::Tensor;

use super::product::product;
use crate::{Error, Pass, Result, SiteId, WeightMap};

/// One linear site of a [`Linear`]: a range of its outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    site: SiteId,
    outputs: i64,
}

/// y = x Wᵀ + b, for one linear site or several that read the same x (queries, keys and values; gate and up).
///
/// Several are one product. Controls see each part by itself; a part with a control before its product is
/// multiplied by itself, so that the others keep their input.
pub struct Linear {
    /// `[Σ outputs, inputs]`
    weight: Tensor,
    /// `[Σ outputs]`
    bias: Option<Tensor>,
    parts: Vec<Part>,
}

impl Linear {
    /// A layer of weight `[Σ outputs, inputs]` and bias `[Σ outputs]`, whose outputs belong to `parts` in order.
    ///
    /// # Errors
    /// [`Error::Shape`] where these disagree.
    pub fn new(weight: Tensor, bias: Option<Tensor>, parts: &[(SiteId, i64)]) -> Result<Self> {
        let outputs: i64 = parts.iter().map(|part| part.1).sum();
        let shape = weight.size();
        if shape.len() != 2 || shape[0] != outputs {
            return Err(Error::shape("linear weight", format!("[{outputs}, inputs]"), &shape));
        }
        if let Some(bias) = bias.as_ref().filter(|bias| bias.size() != [outputs]) {
            return Err(Error::shape("linear bias", format!("[{outputs}]"), &bias.size()));
        }
        let parts = parts.iter().map(|&(site, outputs)| Part { site, outputs }).collect();
        Ok(Self { weight, bias, parts })
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            parts: self.parts.clone(),
        }
    }

    /// The weight, `[Σ outputs, inputs]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The layer over another table than it was tied to.
    ///
    /// # Errors
    /// [`Error::Shape`] for a table of another shape.
    pub fn retied(&self, weight: &Tensor) -> Result<Self> {
        if weight.size() != self.weight.size() {
            return Err(Error::shape("a tied weight", format!("{:?}", self.weight.size()), &weight.size()));
        }
        Ok(Self { weight: weight.shallow_clone(), ..self.handle() })
    }

    /// Whether any control acts at a part.
    pub fn controlled(&self, pass: &Pass<'_>) -> bool {
        pass.controls.is_some() && self.parts.iter().any(|part| pass.acts_at(part.site))
    }

    /// `[.., inputs] → [.., Σ outputs]`, through the controls.
    ///
    /// # Errors
    /// The controls' and LibTorch's.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        if self.controlled(pass) { self.forward_controlled(x, pass) } else { self.product(x) }
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        product(x, &self.weight, self.bias.as_ref())
    }

    fn forward_controlled(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        if let [part] = &self.parts[..] {
            let x = pass.input(part.site, x.shallow_clone())?;
            let y = self.product(&x)?;
            return pass.linear(part.site, &x, y);
        }
        if self.parts.iter().any(|part| pass.acts_before(part.site)) {
            return self.forward_split(x, pass);
        }
        let sites = self.parts.iter().map(|part| (part.site, part.outputs));
        pass.linear_parts(sites, x, self.product(x)?)
    }

    /// Part by part, each with an input of its own.
    fn forward_split(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let mut start = 0;
        let mut out = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let x = pass.input(part.site, x.shallow_clone())?;
            let weight = self.weight.f_narrow(0, start, part.outputs)?;
            let bias = self.bias.as_ref().map(|b| b.f_narrow(0, start, part.outputs)).transpose()?;
            start += part.outputs;
            let y = product(&x, &weight, bias.as_ref())?;
            out.push(pass.linear(part.site, &x, y)?);
        }
        Ok(Tensor::f_cat(&out, -1)?)
    }

    /// The layer with the weights and biases that `f` answers for; the same storage where it answers for none.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight or a bias of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        let mut mapped = self.handle();
        if let Some(weight) = self.map_parts(&self.weight, f)? {
            mapped.weight = weight;
        }
        if let Some(bias) = self.bias.as_ref().map(|bias| self.map_parts(bias, f)).transpose()?.flatten() {
            mapped.bias = Some(bias);
        }
        Ok(mapped)
    }

    /// `all` `[Σ outputs, ..]` with the parts that `f` answers for; none if there are none.
    fn map_parts(&self, all: &Tensor, f: WeightMap<'_>) -> Result<Option<Tensor>> {
        let (mut start, mut changed, mut parts) = (0, false, Vec::with_capacity(self.parts.len()));
        for part in &self.parts {
            let old = all.f_narrow(0, start, part.outputs)?;
            start += part.outputs;
            parts.push(match f(part.site, &old)? {
                Some(new) if new.size() != old.size() => {
                    let what = if old.dim() == 1 { "a mapped bias" } else { "a mapped weight" };
                    return Err(Error::shape(what, format!("{:?}", old.size()), &new.size()));
                }
                Some(new) => {
                    changed = true;
                    new.f_to_kind(old.f_kind()?)?
                }
                None => old,
            });
        }
        if changed { Ok(Some(Tensor::f_cat(&parts, 0)?)) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{At, Binding, Control, Controls, Dims, SiteKind, SiteMap};
    use tch::kind::FLOAT_CPU;

    /// Multiplies one site's input and another's output.
    struct Scale {
        input: &'static str,
        output: &'static str,
    }
    impl Control for Scale {
        fn handle(&self) -> Box<dyn Control> {
            Box::new(Self { ..*self })
        }
        fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
            if !self.input.is_empty() {
                sites.select(SiteKind::Linear, self.input)?.into_iter().for_each(|s| to.at_input(s, 0));
            }
            sites.select(SiteKind::Linear, self.output)?.into_iter().for_each(|s| to.at(s, 0));
            Ok(())
        }
        fn input(&self, _at: At<'_>, x: Tensor) -> Result<Tensor> {
            Ok(x.f_mul_scalar(3.0)?)
        }
        fn linear(&self, _at: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
            Ok(y.f_mul_scalar(2.0)?)
        }
    }

    fn fused() -> (SiteMap, Linear) {
        let mut sites = SiteMap::new();
        let q = sites.add("a.q", Dims::Linear { inputs: 4, outputs: 3 });
        let k = sites.add("a.k", Dims::Linear { inputs: 4, outputs: 2 });
        let w = Tensor::arange(20, FLOAT_CPU).view([5, 4]).sin();
        let b = Tensor::arange(5, FLOAT_CPU).cos();
        (sites, Linear::new(w, Some(b), &[(q, 3), (k, 2)]).unwrap())
    }

    #[test]
    fn controls_see_their_part_only() {
        let (sites, layer) = fused();
        let x = Tensor::arange(8, FLOAT_CPU).view([2, 4]);
        let plain = layer.forward(&x, &Pass::default()).unwrap();
        let run = |input, output| {
            let controls = Controls::bind(&sites, vec![Box::new(Scale { input, output })]).unwrap();
            layer.forward(&x, &Pass::with_controls(&controls)).unwrap()
        };
        let y = run("", "q");
        assert!(y.narrow(-1, 0, 3).allclose(&(plain.narrow(-1, 0, 3) * 2.0), 1e-6, 1e-6, false));
        assert!(y.narrow(-1, 3, 2).equal(&plain.narrow(-1, 3, 2)));
        // An input control at k leaves q's input alone, and k's bias out of it.
        let y = run("k", "q");
        assert!(y.narrow(-1, 0, 3).allclose(&(plain.narrow(-1, 0, 3) * 2.0), 1e-6, 1e-6, false));
        let k = (&x * 3.0)
            .linear(&layer.weight().narrow(0, 3, 2), layer.bias.as_ref().map(|b| b.narrow(0, 3, 2)).as_ref());
        assert!(y.narrow(-1, 3, 2).allclose(&k, 1e-6, 1e-6, false));
    }

    /// Gives back what it is given.
    struct Leave;
    impl Control for Leave {
        fn handle(&self) -> Box<dyn Control> {
            Box::new(Self)
        }
        fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
            sites.of_kind(SiteKind::Linear).for_each(|(s, _)| to.at(s, 0));
            Ok(())
        }
        fn linear(&self, at: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
            if let Some(taps) = at.pass.taps {
                taps.push(at.site, y.shallow_clone());
            }
            Ok(y)
        }
    }

    /// Stops the gradient.
    struct Stop;
    impl Control for Stop {
        fn handle(&self) -> Box<dyn Control> {
            Box::new(Self)
        }
        fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
            sites.of_kind(SiteKind::Linear).for_each(|(s, _)| to.at(s, 0));
            Ok(())
        }
        fn linear(&self, _: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
            Ok(y.f_detach()?)
        }
    }

    #[test]
    fn a_control_can_stop_the_gradient_of_a_part() {
        let (sites, layer) = fused();
        let x = Tensor::arange(8, FLOAT_CPU).view([2, 4]).set_requires_grad(true);
        let controls = Controls::bind(&sites, vec![Box::new(Stop)]).unwrap();
        let y = layer.forward(&x, &Pass::with_controls(&controls)).unwrap();
        assert!(!y.requires_grad());
        assert!(layer.forward(&x, &Pass::default()).unwrap().requires_grad());
    }

    #[test]
    fn parts_that_no_control_changed_are_not_copied() {
        let (sites, layer) = fused();
        let x = Tensor::arange(8, FLOAT_CPU).view([2, 4]);
        let controls = Controls::bind(&sites, vec![Box::new(Leave)]).unwrap();
        let taps = crate::Taps::new();
        let pass = Pass { taps: Some(&taps), ..Pass::with_controls(&controls) };
        let y = layer.forward(&x, &pass).unwrap();
        assert!(y.equal(&layer.forward(&x, &Pass::default()).unwrap()));
        assert_eq!(taps.take()[0].1.data_ptr(), y.data_ptr());
    }

    #[test]
    fn mapping_one_part_shares_or_copies() {
        let (sites, layer) = fused();
        let k = sites.select(SiteKind::Linear, "k").unwrap()[0];
        let same = layer.map_weights(&mut |_, _| Ok(None)).unwrap();
        let weight = layer.weight();
        assert_eq!(same.weight().data_ptr(), weight.data_ptr());
        let mapped = layer.map_weights(&mut |site, w| Ok((site == k).then(|| w * 2.0))).unwrap();
        assert!(mapped.weight().narrow(0, 0, 3).equal(&weight.narrow(0, 0, 3)));
        assert!(mapped.weight().narrow(0, 3, 2).equal(&(weight.narrow(0, 3, 2) * 2.0)));
        // Its bias is mapped with it.
        let biases = layer.bias.as_ref().unwrap();
        let bias = mapped.bias.as_ref().unwrap();
        assert!(bias.narrow(0, 0, 3).equal(&biases.narrow(0, 0, 3)));
        assert!(bias.narrow(0, 3, 2).equal(&(biases.narrow(0, 3, 2) * 2.0)));
        let weight_only = layer.map_weights(&mut |_, w| Ok((w.dim() == 2).then(|| w * 2.0))).unwrap();
        assert_eq!(weight_only.bias.as_ref().unwrap().data_ptr(), biases.data_ptr());
        let bad = layer.map_weights(&mut |_, w| Ok(Some(w.narrow(0, 0, 1))));
        assert!(matches!(bad, Err(Error::Shape { .. })));
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let mut sites = SiteMap::new();
        let s = sites.add("a", Dims::Linear { inputs: 2, outputs: 3 });
        let w = || Tensor::zeros([3, 2], FLOAT_CPU);
        assert!(Linear::new(w(), None, &[(s, 2)]).is_err());
        assert!(Linear::new(w(), Some(Tensor::zeros([1], FLOAT_CPU)), &[(s, 3)]).is_err());
    }

    #[test]
    fn controls_of_another_model_are_refused() {
        let (sites, _) = fused();
        let (others, _) = fused();
        let controls = Controls::bind(&sites, vec![Box::new(Scale { input: "", output: "q" })]).unwrap();
        let pass = Pass::with_controls(&controls);
        assert!(pass.check_sites(&sites).is_ok());
        assert!(matches!(pass.check_sites(&others), Err(Error::ForeignSites)));
    }
}
