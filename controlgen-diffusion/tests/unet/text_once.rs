//! Under classifier-free guidance: one call a step, and the text's keys and values once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use controlgen_core::guidance::{ClassifierFreeGuidance, Guider};
use controlgen_core::noise::Stream;
use controlgen_core::{At, Binding, Condition, Control, Controls, Placement, Result, SiteKind, SiteMap};
use controlgen_diffusion::{Ddim, DiffusionSchedule, Spacing, sample};
use tch::{Kind, Tensor};

use crate::support::{Case, open};

/// Counts the products at `add_*_proj`, `to_k` and `to_v` that read a text, and the passes and their rows.
#[derive(Clone, Default)]
struct Count {
    text: Arc<AtomicUsize>,
    passes: Arc<AtomicUsize>,
    rows: Arc<AtomicUsize>,
}

/// How many such sites there are, and how wide the text is.
fn of_text(sites: &SiteMap) -> usize {
    let names = ["attn2.to_k", "attn2.to_v", "add_k_proj", "add_v_proj"];
    names.iter().filter_map(|name| sites.select(SiteKind::Linear, name).ok()).map(|found| found.len()).sum()
}

impl Control for Count {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.clone())
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        for name in ["attn2.to_k", "attn2.to_v", "add_k_proj", "add_v_proj"] {
            sites.select(SiteKind::Linear, name).unwrap_or_default().into_iter().for_each(|s| to.at(s, 0));
        }
        sites.select(SiteKind::Conv, "conv_in")?.into_iter().for_each(|s| to.at(s, 1));
        Ok(())
    }
    fn linear(&self, at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
        if at.slot == 0 {
            self.text.fetch_add(1, Relaxed);
        } else {
            self.passes.fetch_add(1, Relaxed);
            self.rows.fetch_add(usize::try_from(x.size()[0]).unwrap(), Relaxed);
        }
        Ok(y)
    }
}

#[test]
fn the_text_is_read_once_an_image() {
    let _no_gradients = tch::no_grad_guard();
    for name in ["unet_sd1", "unet_sdxl", "unet_if1", "unet_karlo_decoder"] {
        let learned = matches!(name, "unet_if1" | "unet_karlo_decoder");
        let model = open(name, learned, Placement::CPU);
        let case = Case::of(name, &*model);
        let count = Count::default();
        let expected = of_text(model.sites());
        assert!(expected >= 4, "{name}: {expected} sites");
        let controls = Controls::bind(model.sites(), vec![Box::new(count.clone())]).unwrap();
        let channels = model.spec().channels;
        let of = |row| -> Vec<Condition> { vec![case.condition(row)] };
        let guider = Guider::new(model, vec![of(0), of(1)], Some(controls), 1).unwrap();
        let guider = guider.with(ClassifierFreeGuidance::new(3.0).unwrap());
        let schedule = DiffusionSchedule::linear(1e-4, 0.02, 1000).unwrap();
        let steps = schedule.steps(&schedule.timesteps(5, Spacing::Leading { offset: 1 }).unwrap()).unwrap();
        let x = Tensor::ones([3, channels, 8, 8], (Kind::Float, tch::Device::Cpu));
        let mut noise: Vec<Stream> = (0..3).map(|i| Stream::new(7, i)).collect();
        let out = sample(&Ddim::new(0.0).unwrap(), &guider, x, &steps, &mut noise).unwrap();
        assert_eq!(out.size(), [3, channels, 8, 8]);
        assert_eq!(count.text.load(Relaxed), expected, "{name}: keys and values of the text");
        assert_eq!(count.passes.load(Relaxed), 5, "{name}: calls in 5 steps");
        assert_eq!(count.rows.load(Relaxed), 5 * 6, "{name}: rows of two branches of three samples");
    }
}
