//! What is added to the time's embedding for a class or a number.

use controlgen_core::config::{Config, limits};
use controlgen_core::layers::{Activation, Embedding, Linear};
use controlgen_core::{Condition, Error, Pass, Placement, Result, Tokens, WeightMap};
use tch::{Kind, Tensor};

use super::blocks::{Scope, Sinusoid, TimestepEmbedding};
use super::conditions;

/// What is added to the time's embedding for a class or a number: `class_embed_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClassLabels {
    /// Nothing.
    None,
    /// A row of a table of so many.
    Table(i64),
    /// A number, embedded like a timestep.
    Timestep,
    /// An embedding, as it is.
    Identity,
    /// An embedding of this width, through two layers.
    Projection(i64),
    /// An embedding of this width, through one layer.
    SimpleProjection(i64),
}

impl ClassLabels {
    /// Reads `class_embed_type`, one of `known`, and `num_class_embeds`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another, naming the known; [`Error::Config`].
    pub fn from_config(config: &Config, known: &[&str]) -> Result<Self> {
        let classes = config.int_if("num_class_embeds", 1, limits::VOCAB)?;
        let inputs = || config.int("projection_class_embeddings_input_dim", 1, limits::WIDTH);
        let Some(found) = config.str("class_embed_type")? else {
            return Ok(classes.map_or(Self::None, Self::Table));
        };
        let refuse = || Err(Error::unsupported(format!("class_embed_type `{found}`"), known.join(", ")));
        if !known.contains(&found) {
            return refuse();
        }
        Ok(match found {
            "timestep" => Self::Timestep,
            "identity" => Self::Identity,
            "projection" => Self::Projection(inputs()?),
            "simple_projection" => Self::SimpleProjection(inputs()?),
            _ => return refuse(),
        })
    }
}

/// The layers for class labels.
pub enum Labels {
    /// Nothing.
    None,
    /// A table.
    Table(Embedding),
    /// For a number's sinusoid.
    Level(TimestepEmbedding),
    /// None, for an embedding as it is.
    Identity,
    /// Two.
    Projection(TimestepEmbedding),
    /// One.
    Linear(Linear),
}

impl Labels {
    /// Loads `class_embedding` of a network whose sinusoid is `first` wide, and its time's embedding `time`.
    ///
    /// # Errors
    /// Those of the checkpoint.
    pub fn load(
        scope: &mut Scope<'_, '_>,
        labels: ClassLabels,
        (first, time): (i64, i64),
        act: Activation,
    ) -> Result<Self> {
        let name = "class_embedding";
        Ok(match labels {
            ClassLabels::None => Self::None,
            ClassLabels::Table(rows) => Self::Table(scope.embedding(name, (rows, time))?),
            ClassLabels::Timestep => {
                Self::Level(TimestepEmbedding::load(scope.below(name), (first, time), act, None)?)
            }
            ClassLabels::Identity => Self::Identity,
            ClassLabels::Projection(width) => {
                let silu = Activation::Silu;
                Self::Projection(TimestepEmbedding::load(scope.below(name), (width, time), silu, None)?)
            }
            ClassLabels::SimpleProjection(width) => Self::Linear(scope.linear(name, (width, time), true)?),
        })
    }

    /// Of the class or `class_labels` of each condition, `[B, time]`.
    ///
    /// # Errors
    /// Those of [`conditions::classes`] and [`conditions::stacked`]; the controls'.
    pub fn embed(
        &self,
        conditions: &[Condition],
        (sinusoid, time): (&Sinusoid, i64),
        placement: Placement,
        pass: &Pass<'_>,
    ) -> Result<Option<Tensor>> {
        let stacked =
            |shape: &[i64], placement| conditions::stacked(conditions, "class_labels", shape, placement);
        Ok(Some(match self {
            Self::None => return Ok(None),
            Self::Table(table) => {
                let rows = table.weight().size2()?.0;
                let ids = conditions::classes(conditions, rows, placement)?.f_unsqueeze(1)?;
                table.forward(Tokens::Ids(&ids), pass)?.f_squeeze_dim(1)?
            }
            Self::Level(layer) => {
                let levels = stacked(&[], placement.with_kind(Kind::Float))?;
                layer.forward(&sinusoid.forward(&levels)?, pass)?
            }
            Self::Identity => stacked(&[time], placement)?,
            Self::Projection(layer) => layer.forward(&stacked(&[layer.inputs()], placement)?, pass)?,
            Self::Linear(layer) => layer.forward(&stacked(&[layer.weight().size2()?.1], placement)?, pass)?,
        }))
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn handle(&self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Table(layer) => Self::Table(layer.handle()),
            Self::Level(layer) => Self::Level(layer.handle()),
            Self::Identity => Self::Identity,
            Self::Projection(layer) => Self::Projection(layer.handle()),
            Self::Linear(layer) => Self::Linear(layer.handle()),
        }
    }

    /// A handle with other weights.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        Ok(match self {
            Self::None => Self::None,
            Self::Table(layer) => Self::Table(layer.map_weights(f)?),
            Self::Level(layer) => Self::Level(layer.map_weights(f)?),
            Self::Identity => Self::Identity,
            Self::Projection(layer) => Self::Projection(layer.map_weights(f)?),
            Self::Linear(layer) => Self::Linear(layer.map_weights(f)?),
        })
    }
}
