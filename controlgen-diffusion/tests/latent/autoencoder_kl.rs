//! AutoencoderKL, whole and in tiles.

use std::collections::HashMap;

use controlgen_core::checkpoint::Weights;
use controlgen_core::{
    At, Autoencoder, Binding, Config, Control, Controls, EnableGrad, Error, Pass, Placement, Result,
    SiteKind, SiteMap,
};
use controlgen_diffusion::models::{AutoencoderKl, Tiling, open_autoencoder};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::support::{F64, altered, cases, config, distance, fixture, weights};

const MODELS: [&str; 2] = ["vae", "vae_flux"];

fn load_as(config: &Config, name: &str, placement: Placement) -> Result<AutoencoderKl> {
    let source = weights(name);
    AutoencoderKl::load(config, &Weights::new(&source, placement.options()), placement)
}

fn load(name: &str, placement: Placement) -> AutoencoderKl {
    load_as(&config(name), name, placement).unwrap()
}

/// diffusers' latents, which are not scaled, as ours.
fn scaled(model: &AutoencoderKl, raw: &Tensor) -> Tensor {
    (raw - model.spec().shift_factor) * model.spec().scaling_factor
}

/// The distances of what is decoded and of what is encoded from the tensors of these names.
fn distances(model: &AutoencoderKl, cases: &HashMap<String, Tensor>, prefix: &str) -> [f64; 2] {
    let of = |field: &str| &cases[&format!("{prefix}{field}")];
    let decoded = model.decode(&scaled(model, of("latents"))).unwrap();
    let encoded = model.encode(of("images")).unwrap();
    [distance(&decoded, of("sample")), distance(&encoded.mean, &scaled(model, of("latent_mean")))]
}

#[test]
fn images_and_latents_are_diffusers() {
    let _no_gradients = tch::no_grad_guard();
    for name in MODELS {
        let cases = cases(name);
        for placement in [Placement::CPU, F64] {
            let model = load(name, placement);
            let far = distances(&model, &cases, "");
            assert!(far[0] < 1e-5 && far[1] < 1e-5, "{name}, {:?}: {far:?}", placement.kind);
            let sliced = distances(&model.with_slicing(true), &cases, "");
            assert!(sliced[0] < 1e-5 && sliced[1] < 1e-5, "{name}: {sliced:?}");
            let encoded = model.encode(&cases["images"]).unwrap().log_variance.unwrap();
            let scale = 2.0 * model.spec().scaling_factor.ln();
            let far = distance(&(encoded - scale), &cases["latent_logvar"]);
            assert!(far < 1e-5, "{name}: {far}");
        }
    }
    let spec = load("vae_flux", Placement::CPU).spec().clone();
    assert_eq!((spec.scaling_factor, spec.shift_factor, spec.downscale), (0.3611, 0.1159, 2));
    let spec = load("vae", Placement::CPU).spec().clone();
    assert_eq!((spec.scaling_factor, spec.shift_factor, spec.downscale), (0.18215, 0.0, 4));
}

#[test]
fn tiles_are_diffusers() {
    let _no_gradients = tch::no_grad_guard();
    for name in MODELS {
        let (model, cases) = (load(name, Placement::CPU), cases(name));
        for case in ["tiled", "odd", "apart"] {
            let sizes: Vec<i64> = (&cases[&format!("{case}.sizes")]).try_into().unwrap();
            let tiled = model.with_tiling(Some(Tiling::new(sizes[0], sizes[1]).unwrap()));
            let far = distances(&tiled, &cases, &format!("{case}."));
            assert!(far[0] < 1e-5 && far[1] < 1e-5, "{name}, {case}: {far:?}");
            let whole = distances(&tiled.with_tiling(None), &cases, &format!("{case}."));
            assert!(whole[0] > 1e-2 && whole[1] > 1e-3, "{name}, {case}: {whole:?}");
        }
        // One tile that covers everything is the whole, to the bit.
        let latents = scaled(&model, &cases["latents"]);
        let covered = model.with_tiling(Some(Tiling::new(7, 3).unwrap()));
        assert!(covered.decode(&latents).unwrap().equal(&model.decode(&latents).unwrap()), "{name}");
        let images = &cases["images"];
        assert!(covered.encode(images).unwrap().mean.equal(&model.encode(images).unwrap().mean), "{name}");
    }
    for (tile, overlap) in [(0, 0), (4, 4), (4, -1)] {
        assert!(matches!(Tiling::new(tile, overlap), Err(Error::Value { .. })));
    }
    assert_eq!((Tiling::default().tile(), Tiling::default().overlap()), (64, 16));
}

#[test]
fn it_is_differentiable_in_tiles_too() {
    let model = load("vae_flux", F64);
    let latents = cases("vae_flux")["latents"].to_kind(Kind::Double);
    let direction = latents.cos();
    for tiling in [None, Some(Tiling::new(4, 2).unwrap())] {
        let model = model.with_tiling(tiling);
        let f = |z: &Tensor| model.decode(z).unwrap().sin().sum(Kind::Double);
        let gradient = {
            let _gradients = EnableGrad::new();
            let leaf = latents.detach().set_requires_grad(true);
            f(&leaf).backward();
            leaf.grad()
        };
        let _no_gradients = tch::no_grad_guard();
        let h = 1e-6;
        let slope = (f(&(&latents + &direction * h)) - f(&(&latents - &direction * h))) / (2.0 * h);
        let expected = (gradient * &direction).sum(Kind::Double).double_value(&[]);
        let far = (slope.double_value(&[]) - expected).abs() / expected.abs();
        assert!(far < 1e-5, "{tiling:?}: {far}");
    }
}

/// Doubles the outputs of one convolution.
struct Twice(&'static str);
impl Control for Twice {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self(self.0))
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Conv, self.0)?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn linear(&self, _: At<'_>, _: &Tensor, y: Tensor) -> Result<Tensor> {
        Ok(y.f_mul_scalar(2.0)?)
    }
}

#[test]
fn controls_and_other_weights_act_at_its_sites() {
    let _no_gradients = tch::no_grad_guard();
    let (model, cases) = (load("vae", Placement::CPU), cases("vae"));
    let latents = scaled(&model, &cases["latents"]);
    let plain = model.decode(&latents).unwrap();
    let controls = Controls::bind(model.sites(), vec![Box::new(Twice("decoder.conv_out"))]).unwrap();
    let found = model.decode_under(&latents, &Pass::with_controls(&controls)).unwrap();
    assert!(distance(&found, &(&plain * 2.0)) < 1e-6);
    // The same by its weights; the original stays as it is.
    let site = model.sites().select(SiteKind::Conv, "decoder.conv_out").unwrap()[0];
    let mapped = model.map_weights(&mut |at, w| Ok((at == site).then(|| w * 2.0))).unwrap();
    assert!(distance(&mapped.decode(&latents).unwrap(), &(&plain * 2.0)) < 1e-6);
    assert!(model.decode(&latents).unwrap().equal(&plain));
    assert!(model.handle().decode(&latents).unwrap().equal(&plain));
    let other = load("vae", Placement::CPU);
    let foreign = other.decode_under(&latents, &Pass::with_controls(&controls));
    assert!(matches!(foreign, Err(Error::ForeignSites)));
    for (kind, name) in [
        (SiteKind::Linear, "decoder.mid_block.attentions.0.to_q"),
        (SiteKind::Linear, "encoder.mid_block.attentions.0.proj_attn"),
        (SiteKind::Attention, "decoder.mid_block.attentions.0"),
        (SiteKind::Conv, "encoder.down_blocks.1.downsamplers.0.conv"),
        (SiteKind::Conv, "decoder.up_blocks.1.resnets.0.conv_shortcut"),
        (SiteKind::Hidden, "decoder.up_blocks.0.resnets.1"),
        (SiteKind::Conv, "post_quant_conv"),
    ] {
        assert_eq!(model.sites().select(kind, name).unwrap().len(), 1, "{name}");
    }
}

#[test]
fn half_precision_is_left_where_it_overflows() {
    let half = Placement::CPU.with_kind(Kind::Half);
    assert_eq!(load("vae", half).spec().placement.kind, Kind::Float, "force_upcast is the default");
    let fine = load_as(&altered("vae", &[("force_upcast", json!(false))]), "vae", half).unwrap();
    assert_eq!(fine.spec().placement.kind, Kind::Half);
    let brain = load("vae", Placement::CPU.with_kind(Kind::BFloat16));
    assert_eq!(brain.spec().placement.kind, Kind::BFloat16);
    // What comes out has the type of what goes in.
    let latents = scaled(&brain, &cases("vae")["latents"]);
    let made = brain.decode(&latents).unwrap();
    assert_eq!(made.kind(), Kind::Float);
    assert!(distance(&made, &cases("vae")["sample"]) < 0.3);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let model = load("vae", Placement::CPU);
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    for bad in [&[1, 3, 8, 8][..], &[4, 8, 8], &[0, 4, 8, 8], &[1, 4, 0, 8]] {
        assert!(matches!(model.decode(&zeros(bad)), Err(Error::Shape { .. })), "{bad:?}");
    }
    for bad in [&[1, 4, 8, 8][..], &[1, 3, 8, 10], &[1, 3, 6, 8], &[3, 8, 8]] {
        assert!(matches!(model.encode(&zeros(bad)), Err(Error::Shape { .. })), "{bad:?}");
    }
    let whole = zeros(&[1, 4, 8, 8]).to_kind(Kind::Int64);
    assert!(matches!(model.decode(&whole), Err(Error::Kind { .. })));
    let bad = Tensor::cat(&[zeros(&[1, 4, 8, 8]), zeros(&[1, 4, 8, 8]) + f64::NAN], 0);
    match model.decode(&bad) {
        Err(Error::NotFinite { what, at, found }) => {
            assert_eq!((&*what, &*at, &*found), ("latents", "row 1", "NaN"));
        }
        other => panic!("{other:?}"),
    }

    let load = |fields: &[_]| load_as(&altered("vae", fields), "vae", Placement::CPU).err().unwrap();
    let blocks = json!(["DownEncoderBlock2D", "CrossAttnDownBlock2D", "DownEncoderBlock2D"]);
    match load(&[("down_block_types", blocks)]) {
        Error::Unsupported { what, supported } => {
            assert!(what.contains("CrossAttnDownBlock2D") && supported.contains("AttnDownEncoderBlock2D"));
        }
        other => panic!("{other}"),
    }
    for (field, value) in [("_class_name", json!("VQModel")), ("latents_mean", json!([0.0, 0.0, 0.0, 0.0]))] {
        assert!(matches!(load(&[(field, value)]), Error::Unsupported { .. }), "{field}");
    }
    for (field, value) in [
        ("block_out_channels", json!([4, 8])),
        ("block_out_channels", json!([])),
        ("norm_num_groups", json!(3)),
        ("latent_channels", json!(0)),
        ("scaling_factor", json!(0)),
        ("up_block_types", json!("UpDecoderBlock2D")),
    ] {
        assert!(matches!(load(&[(field, value)]), Error::Config { .. }), "{field}");
    }
    assert!(matches!(load(&[("act_fn", json!("gleu"))]), Error::Value { .. }));
    assert!(matches!(load(&[("layers_per_block", json!(2))]), Error::Keys { .. }));
    assert!(matches!(load(&[("mid_block_add_attention", json!(false))]), Error::Keys { .. }));
    assert!(matches!(load(&[("latent_channels", json!(5))]), Error::Shape { .. }));
}

#[test]
fn directories_are_opened_by_class() {
    let model = open_autoencoder(&fixture("vae"), Placement::CPU).unwrap();
    assert_eq!((model.spec().channels, model.spec().latent_channels), (3, 4));
    let other = open_autoencoder(&fixture("dit"), Placement::CPU).err().unwrap();
    assert!(matches!(&other, Error::Unsupported { supported, .. } if supported == "AutoencoderKL"));
}
