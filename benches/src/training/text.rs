//! The text tower of shapes: CLIP's, trained to answer what captions say.
//!
//! Eight positions behind the longest caption see all of it. Each is asked about a part of it by linear heads, which are thrown
//! away: how many objects there are, before what, where the first one lies; what is said of the first and of the second; what
//! stands in each of the five places. The state at the text's end is asked everything. So the states that a denoiser's
//! attention reads, and the pooled one, already hold what belongs together.

use std::path::Path;

use controlgen_core::checkpoint::Weights;
use controlgen_core::noise::{Noise, Stream};
use controlgen_core::train::{Batch, Loss, Parameters, Task};
use controlgen_core::{Config, Error, Pass, Placement, Result, Tokens};
use controlgen_diffusion::models::{ClipText, ClipTextInput};
use controlgen_diffusion::prompt::ClipTokenizer;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::run::begin;
use super::{Card, Model, Recipe, Settings};
use crate::shapes::{
    Background, Caption, Named, NamedObject, Position, Scene, Size, Split, tokenizer_folder,
};

/// The first position that is asked; there are eight.
const FIRST: i64 = 24;

/// How many answers each question of an object has: shape, colour, size, fill, each with `none`, size with `unsaid` too.
const OBJECT: [i64; 4] = [7, 9, 4, 3];

/// How many answers each question has, by position.
fn questions() -> Vec<Vec<i64>> {
    let mut all = vec![vec![2, 5, 6]];
    all.extend(std::iter::repeat_n(OBJECT.to_vec(), 7));
    all
}

/// The answers, in the order of the questions.
fn answers(named: &Named) -> Vec<i64> {
    let object = |object: Option<&NamedObject>| {
        object.map_or(OBJECT.map(|answers| answers - 1), |object| {
            let size = object.size.map_or(2, Size::index);
            [object.shape.index(), object.color.index(), size, object.fill.index()].map(|index| index as i64)
        })
    };
    let background = named.background.map_or(4, Background::index);
    let position = named.position.map_or(5, Position::index);
    let mut all = vec![named.objects.len() as i64 - 1, background as i64, position as i64];
    all.extend([0, 1].into_iter().flat_map(|k| object(named.objects.get(k))));
    for &place in Position::ALL {
        let there = match named.position {
            Some(position) if position == place => named.objects.first(),
            Some(position) if position.opposite() == place => named.objects.get(1),
            _ => None,
        };
        all.extend(object(there));
    }
    all
}

/// What it is trained with.
pub(super) fn settings() -> Settings {
    Settings {
        steps: 1000,
        batch: 128,
        rate: 2e-3,
        warmup: 100,
        beta2: 0.98,
        ema: 0.99,
        evaluate_every: 250,
        ..Settings::default()
    }
}

/// The tower with its heads.
pub(super) struct TextTower {
    config: Config,
    tokenizer: ClipTokenizer,
    placement: Placement,
    parameters: Parameters,
}

/// Logits of the heads at the positions and of the one at the end, by question.
struct Answered {
    positions: Vec<Tensor>,
    end: Vec<Tensor>,
}

impl TextTower {
    pub fn new(placement: Placement, seed: u64) -> Result<Self> {
        let tokenizer = ClipTokenizer::open(tokenizer_folder())?;
        let config = json!({
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": vocabulary()?,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": tokenizer.context(),
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": 128,
            "bos_token_id": tokenizer.bos(),
            "eos_token_id": tokenizer.eos(),
            "pad_token_id": tokenizer.pad(),
        });
        let fields = config.as_object().cloned().unwrap_or_default();
        let config = Config::from_fields("config.json", fields);
        let tower =
            begin(seed, placement.device, |weights| ClipText::load(&config, weights, Placement::CPU))?;
        let mut named: Vec<_> =
            tower.into_iter().map(|(name, value)| (format!("tower.{name}"), value)).collect();
        named.extend(begin(seed + 1, placement.device, heads)?);
        Ok(Self { config, tokenizer, placement, parameters: Parameters::new(named)? })
    }

    fn answered(&self, captions: &[Caption]) -> Result<Answered> {
        let mut ids = Vec::new();
        for caption in captions {
            ids.extend(self.tokenizer.framed(&self.tokenizer.encode(&caption.text)?));
        }
        let ids = Tensor::f_from_slice(&ids)?.f_view([captions.len() as i64, -1])?;
        let ids = ids.f_to_device(self.placement.device)?;
        let weights = Weights::new(&self.parameters, self.placement.options());
        // The heads first: the tower's loader refuses parameters that nobody asked for.
        let (at, end) = heads(&weights)?;
        let tower = ClipText::load(&self.config, &weights.scope("tower"), self.placement)?;
        let found = tower.forward(ClipTextInput::new(Tokens::Ids(&ids), None), &Pass::default())?;
        let split = |logits: &Tensor, sizes: &[i64]| logits.f_split_with_sizes(sizes, 1);
        let mut positions = Vec::new();
        for ((k, head), sizes) in (FIRST..).zip(&at).zip(questions()) {
            positions.extend(split(&found.hidden.f_select(1, k)?.f_linear(head, None::<Tensor>)?, &sizes)?);
        }
        let pooled =
            found.pooled.ok_or_else(|| Error::unsupported("a CLIP that pools nothing", "one that pools"))?;
        let end = split(&pooled.f_linear(&end, None::<Tensor>)?, &questions().concat())?;
        Ok(Answered { positions, end })
    }
}

/// How many tokens the tokenizer has.
fn vocabulary() -> Result<usize> {
    let path = tokenizer_folder().join("vocab.json");
    let text = std::fs::read(&path).map_err(|error| Error::io(&path, error))?;
    let vocab: serde_json::Map<String, Value> =
        serde_json::from_slice(&text).map_err(|error| Error::format(&path, error))?;
    Ok(vocab.len())
}

/// The heads' weights, of each position and of the end.
fn heads(weights: &Weights<'_>) -> Result<(Vec<Tensor>, Tensor)> {
    let get = |name: String, sizes: &[i64]| weights.get(&name, &[sizes.iter().sum(), 128]);
    let all = questions();
    let at = all.iter().enumerate().map(|(k, sizes)| get(format!("heads.{k}.weight"), sizes));
    Ok((at.collect::<Result<Vec<_>>>()?, get("heads.end.weight".to_owned(), &all.concat())?))
}

/// Captions of scenes, and the answers `[B, questions]`.
fn drawn(count: usize, split: Split, stream: &mut Stream) -> Result<(Vec<Caption>, Tensor)> {
    let captions: Vec<Caption> =
        (0..count).map(|_| Caption::of(&Scene::sample(stream, split), stream)).collect();
    let right: Vec<i64> = captions.iter().flat_map(|caption| answers(&caption.named)).collect();
    Ok((captions, Tensor::f_from_slice(&right)?.f_view([count as i64, -1])?))
}

impl Task for TextTower {
    fn examples(&self) -> usize {
        super::DRAWN_ANEW
    }

    fn loss(&mut self, batch: Batch<'_>) -> Result<Loss> {
        let (captions, right) = drawn(batch.examples.len(), Split::Training, batch.stream)?;
        let right = right.f_to_device(self.placement.device)?;
        let Answered { positions, end } = self.answered(&captions)?;
        let mut losses = Vec::new();
        for logits in [&positions, &end] {
            for (logits, k) in logits.iter().zip(0i64..) {
                let logits = logits.f_to_kind(Kind::Float)?;
                losses.push(logits.f_cross_entropy_loss(
                    &right.f_select(1, k)?,
                    None::<Tensor>,
                    tch::Reduction::Mean,
                    -100,
                    0.0,
                )?);
            }
        }
        // The mean over the questions at the positions and that at the end.
        Ok(Tensor::f_stack(&losses, 0)?.f_mean(Kind::Float)?.f_mul_scalar(2.0)?.into())
    }

    fn evaluate(&mut self) -> Result<Vec<(String, f64)>> {
        let mut all = Vec::new();
        for (name, split) in [("training", Split::Training), ("held_out", Split::HeldOut)] {
            let (captions, right) = drawn(1000, split, &mut Noise::seeded(0x7465_7374).stream(0))?;
            let Answered { positions, end } = self.answered(&captions)?;
            for (of, logits) in [("positions", positions), ("end", end)] {
                let found =
                    logits.iter().map(|logits| Ok(logits.f_argmax(1, false)?)).collect::<Result<Vec<_>>>()?;
                let found = Tensor::f_stack(&found, 1)?.f_to_device(tch::Device::Cpu)?;
                let share = found.f_eq_tensor(&right)?.f_all_dim(1, false)?.f_to_kind(Kind::Float)?;
                all.push((format!("{name}_{of}"), share.f_mean(Kind::Float)?.f_double_value(&[])?));
            }
        }
        Ok(all)
    }

    fn configuration(&self) -> Value {
        json!({ "model": self.config.fields(), "kind": format!("{:?}", self.placement.kind) })
    }
}

impl Recipe for TextTower {
    fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn models(&self) -> Vec<Model> {
        vec![Model {
            folder: "text_encoder".to_owned(),
            prefix: "tower.".to_owned(),
            config: self.config.clone(),
            stem: "model",
        }]
    }

    fn write_more(&self, folder: &Path) -> Result<()> {
        crate::shapes::write_tokenizer(&folder.join("tokenizer"))
    }

    fn card(&self) -> Card {
        Card {
            title: "The text tower of shapes".to_owned(),
            data: "Captions of scenes of the training split (`benches::shapes`), drawn anew for each step.".to_owned(),
            method: "CLIP's text encoder. Linear heads at eight positions behind the caption, and one at its end, are asked what \
                     the caption says (31 questions each); the loss is the mean of the cross-entropies. The heads are not kept."
                .to_owned(),
            measures: "The share of 1,000 captions of which all 31 answers are right, of the training split and of held-out \
                       combinations, by the heads at the positions and at the end:"
                .to_owned(),
        }
    }
}
