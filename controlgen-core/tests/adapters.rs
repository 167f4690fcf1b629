//! An adapter on a table model: what the trait promises, on the smallest case.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use controlgen_core::testing::{TableLm, contract};
use controlgen_core::{
    Adapter, AdapterId, At, Binding, Control, Controls, Error, LanguageModel, LmInput, MergedWeights, Pass,
    Result, SiteKind, SiteMap, Source, copy_parameters,
};
use tch::{Kind, Tensor, kind::FLOAT_CPU};

/// y + B A x at `lm_head` (Hu et al. 2021), B of zeros at first.
struct LowRank {
    id: AdapterId,
    a: Tensor,
    b: Tensor,
}

impl LowRank {
    fn new(inputs: i64, outputs: i64) -> Self {
        let a = (Tensor::arange(2 * inputs, FLOAT_CPU) * 1.7).sin().view([2, inputs]);
        Self {
            id: AdapterId::unique(),
            a: a.set_requires_grad(true),
            b: Tensor::zeros([outputs, 2], FLOAT_CPU).set_requires_grad(true),
        }
    }
    fn share(&self) -> Self {
        Self { id: self.id, a: self.a.shallow_clone(), b: self.b.shallow_clone() }
    }
}

impl Control for LowRank {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.share())
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Linear, "lm_head")?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn linear(&self, _at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let low = x.f_linear(&self.a, None::<&Tensor>)?.f_linear(&self.b, None::<&Tensor>)?;
        Ok(y.f_add(&low)?)
    }
}

impl Adapter for LowRank {
    fn id(&self) -> AdapterId {
        self.id
    }
    fn adapter_handle(&self) -> Box<dyn Adapter> {
        Box::new(self.share())
    }
    fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("lora_A".into(), self.a.shallow_clone()), ("lora_B".into(), self.b.shallow_clone())]
    }
    fn save(&self, directory: &Path) -> Result<()> {
        let path = directory.join("adapter.safetensors");
        Tensor::write_safetensors(&self.parameters(), &path)?;
        Ok(())
    }
    fn load(&mut self, directory: &Path) -> Result<()> {
        let path = directory.join("adapter.safetensors");
        copy_parameters("adapter.safetensors", &Tensor::read_safetensors(path)?, &self.parameters())
    }
    fn merged<'a>(&'a self, sites: &SiteMap) -> Result<MergedWeights<'a>> {
        let at = sites.select(SiteKind::Linear, "lm_head")?;
        Ok(Box::new(move |site, w| {
            let _no_gradients = tch::no_grad_guard();
            at.contains(&site).then(|| Ok(w.f_add(&self.b.f_matmul(&self.a)?)?)).transpose()
        }))
    }
}

fn forward(model: &dyn LanguageModel, adapter: Option<&dyn Adapter>) -> Tensor {
    let control = |adapter: &dyn Adapter| Controls::bind(model.sites(), vec![adapter.handle()]).unwrap();
    let controls = adapter.map(control);
    let pass = Pass { controls: controls.as_ref(), ..Pass::default() };
    let ids = Tensor::from_slice(&[0i64, 2, 3, 1, 4]).view([1, 5]);
    let mut state = model.start(Source::Rows(1), &pass).unwrap();
    model.forward(LmInput::ids(&ids), &mut state, &pass).unwrap().logits
}

fn parts() -> (TableLm, Box<dyn Adapter>) {
    (TableLm::random(5, 4).unwrap(), Box::new(LowRank::new(30, 5)))
}

/// Gives B other values, through the parameters.
fn train(adapter: &dyn Adapter) {
    let _no_gradients = tch::no_grad_guard();
    let mut b = adapter.parameters().remove(1).1;
    b.copy_(&(Tensor::arange(10, FLOAT_CPU) * 0.9).cos().view([5, 2]));
}

#[test]
fn it_keeps_the_contract() {
    contract::adapter(&parts().0, || Ok(parts().1)).unwrap();
}

#[test]
fn it_is_the_identity_until_trained_and_handles_share_parameters() {
    let (model, adapter) = parts();
    let plain = forward(&model, None);
    let other = adapter.adapter_handle();
    assert!(forward(&model, Some(&*adapter)).equal(&plain), "to the bit");
    assert!(other.id() == adapter.id() && other.id() != parts().1.id());
    train(&*adapter);
    assert!(!forward(&model, Some(&*adapter)).allclose(&plain, 1e-2, 1e-2, false));
    assert!(forward(&model, Some(&*other)).equal(&forward(&model, Some(&*adapter))));
    assert!(forward(&model, None).equal(&plain));
    for (name, parameter) in adapter.parameters() {
        assert_eq!(parameter.kind(), Kind::Float, "{name}");
        assert!(parameter.is_leaf() && parameter.requires_grad(), "{name}");
    }
}

#[test]
fn gradients_reach_its_parameters() {
    let (model, adapter) = parts();
    let loss = forward(&model, Some(&*adapter)).log_softmax(-1, None).select(-1, 2).sum(Kind::Float);
    let b = adapter.parameters().remove(1).1;
    let gradient = Tensor::f_run_backward(&[&loss], &[&b], false, false).unwrap().remove(0);
    assert!(gradient.defined() && gradient.abs().max().double_value(&[]) > 1e-3);
}

#[test]
fn merged_is_unmerged_and_undone_by_dropping() {
    let (model, adapter) = parts();
    train(&*adapter);
    let plain = forward(&model, None);
    let merged = model.map_weights(&mut *adapter.merged(model.sites()).unwrap()).unwrap();
    let unmerged = forward(&model, Some(&*adapter));
    assert!(forward(&*merged, None).allclose(&unmerged, 1e-5, 1e-5, false));
    drop(merged);
    assert!(forward(&model, None).equal(&plain));
}

#[test]
fn it_is_saved_and_loaded() {
    let (model, adapter) = parts();
    train(&*adapter);
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path()).unwrap();
    let mut loaded = parts().1;
    let handle = loaded.adapter_handle();
    loaded.load(folder.path()).unwrap();
    for adapter_again in [loaded, handle] {
        assert!(forward(&model, Some(&*adapter_again)).equal(&forward(&model, Some(&*adapter))));
    }
}

#[test]
fn parameters_that_do_not_fit_change_nothing() {
    let named = |pairs: &[(&str, Tensor)]| -> Vec<(String, Tensor)> {
        pairs.iter().map(|(name, t)| ((*name).to_owned(), t.shallow_clone())).collect()
    };
    let (one, two) = (Tensor::ones([2], FLOAT_CPU), Tensor::ones([3], FLOAT_CPU));
    let own = named(&[("a", Tensor::zeros([2], FLOAT_CPU)), ("b", Tensor::zeros([3], FLOAT_CPU))]);
    let copy = |from: &[(&str, Tensor)]| copy_parameters("file", &named(from), &own);
    let keys = copy(&[("a", one.shallow_clone()), ("c", two.shallow_clone())]);
    let Err(Error::Keys { missing, unexpected, .. }) = keys else { panic!("{keys:?}") };
    assert_eq!((missing, unexpected), (vec!["b".to_owned()], vec!["c".to_owned()]));
    let a = || ("a", one.shallow_clone());
    assert!(matches!(copy(&[a(), ("b", one.shallow_clone())]), Err(Error::Shape { .. })));
    assert!(matches!(copy(&[a(), ("b", two.to_kind(Kind::Int64))]), Err(Error::Kind { .. })));
    assert!(matches!(copy(&[a(), ("b", &two / 0.0)]), Err(Error::NotFinite { .. })));
    assert!(own.iter().all(|(_, t)| t.abs().max().double_value(&[]) == 0.0), "nothing was copied");
    copy(&[a(), ("b", two.to_kind(Kind::Half))]).unwrap();
    assert!(own.iter().all(|(_, t)| t.min().double_value(&[]) == 1.0 && t.kind() == Kind::Float));
}

/// A control without weights cannot be merged.
#[test]
fn merging_is_refused_by_default() {
    struct Nothing;
    impl Control for Nothing {
        fn handle(&self) -> Box<dyn Control> {
            Box::new(Self)
        }
        fn bind(&self, _: &SiteMap, _: &mut Binding<'_>) -> Result<()> {
            Ok(())
        }
    }
    impl Adapter for Nothing {
        fn id(&self) -> AdapterId {
            AdapterId::unique()
        }
        fn adapter_handle(&self) -> Box<dyn Adapter> {
            Box::new(Self)
        }
        fn parameters(&self) -> Vec<(String, Tensor)> {
            Vec::new()
        }
        fn save(&self, _: &Path) -> Result<()> {
            Ok(())
        }
        fn load(&mut self, _: &Path) -> Result<()> {
            Ok(())
        }
    }
    let merged = Nothing.merged(&SiteMap::new());
    assert!(matches!(merged, Err(Error::Unsupported { .. })));
}
