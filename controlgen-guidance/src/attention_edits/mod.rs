//! Attention edits: maps are edited without being computed.

mod columns;
mod edit;
mod mapper;

pub use edit::Edit;

use std::ops::Range;

use controlgen_core::{
    At, Attn, Binding, Control, Error, Lanes, Next, Result, SharedTensor, SiteKind, SiteMap,
};
use tch::Tensor;

use columns::Columns;
use edit::Edited;

/// Prompt-to-Prompt: the rows of one condition follow the attention of another's. Hertz et al., "Prompt-to-Prompt Image
/// Editing with Cross Attention Control" (2022).
///
/// A chain of edits makes of the maps A (of the edited row) and A_s (of its source row) A' = A_s P + A Q, with P and Q
/// `[N, N]` known before the run. Hence
///
/// ```text
/// A' v = SDPA(q_s, k_s, P v) + SDPA(q, k, Q v)
/// ```
///
/// by the fused kernel, and no map is ever stored. Most edits leave P or Q zero and cost one attention, as without
/// them; refining and blending cost the edited rows a second one.
///
/// Rows go by lanes: those of condition `edit` are changed, each by the row of condition `source` with its sample and
/// variant; no other row is. With classifier-free guidance the rows are \[unconditional source, unconditional edit,
/// source, edit\] (conditions 0 to 3 of a [`Guider`](controlgen_core::guidance::Guider) with two roles), and the last
/// alone is an edit. The source rows' mask is followed along with their queries and keys.
///
/// Bind one chain a site: a second control would see the source's queries as the edited row's own.
///
/// ```
/// use controlgen_guidance::{Edit, PromptToPrompt};
///
/// # fn main() -> controlgen_core::Result<()> {
/// // "a cat" to "a dachshund", token 2 of 8 becoming tokens 2 and 3, for 40 steps of 50; more of it in all.
/// let weights = [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0];
/// let cross = PromptToPrompt::new("attn2", 2, 3)
///     .with(Edit::replace_words(&[(2..3, 2..4)], 8)?, 0..40)?
///     .with(Edit::reweight(&weights)?, 0..50)?;
/// // The layout, from maps of at most 16 × 16 positions.
/// let layout = PromptToPrompt::new("attn1", 2, 3).with(Edit::swap(), 0..20)?.up_to(256)?;
/// # let _ = (cross, layout);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct PromptToPrompt {
    selector: String,
    source: u32,
    edit: u32,
    positions: i64,
    chain: Vec<(Edit, Range<usize>)>,
    stretches: Vec<Stretch>,
}

/// Steps in which the same edits act.
#[derive(Clone)]
struct Stretch {
    steps: Range<usize>,
    source: Operator,
    own: Operator,
}

/// [`Columns`] as tensors, in f64.
#[derive(Clone)]
enum Operator {
    Zero,
    Identity,
    /// `[N, 1]`
    Diagonal(SharedTensor),
    /// `[N, N]`
    Matrix(SharedTensor),
}

impl PromptToPrompt {
    /// Edits at the attention sites that `selector` matches ([`SiteMap::select`]): on rows of condition `edit`, after
    /// those of condition `source`, as the lanes number them.
    pub fn new(selector: impl Into<String>, source: u32, edit: u32) -> Self {
        let selector = selector.into();
        Self { selector, source, edit, positions: i64::MAX, chain: Vec::new(), stretches: Vec::new() }
    }

    /// One more edit, of what those before it made, in these steps of the run.
    ///
    /// # Errors
    /// [`Error::Value`] for no steps, or an edit of another number of tokens than those before it.
    pub fn with(mut self, edit: Edit, steps: Range<usize>) -> Result<Self> {
        if steps.is_empty() {
            return Err(Error::value("steps of an edit", "start < end", format!("{steps:?}")));
        }
        let before = self.chain.iter().find_map(|(edit, _)| edit.tokens());
        if let (Some(before), Some(found)) = (before, edit.tokens())
            && before != found
        {
            return Err(Error::value("tokens of a chained edit", before, found));
        }
        self.chain.push((edit, steps));
        self.stretches = self.stretches()?;
        Ok(self)
    }

    /// Only where there are at most `positions` queries, H · W: the paper swaps maps of 16² and smaller.
    ///
    /// # Errors
    /// [`Error::Value`] below 1.
    pub fn up_to(self, positions: i64) -> Result<Self> {
        if positions < 1 {
            return Err(Error::value("positions", ">= 1", positions));
        }
        Ok(Self { positions, ..self })
    }

    /// The chain composed, for each stretch of steps in which the same edits act.
    fn stretches(&self) -> Result<Vec<Stretch>> {
        let mut cuts: Vec<usize> =
            self.chain.iter().flat_map(|(_, steps)| [steps.start, steps.end]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let mut stretches = Vec::new();
        for pair in cuts.windows(2) {
            let active: Vec<_> = self.chain.iter().filter(|(_, steps)| steps.contains(&pair[0])).collect();
            if active.is_empty() {
                continue;
            }
            let edited = active.into_iter().fold(Edited::NOTHING, |so_far, (edit, _)| edit.of(so_far));
            let (source, own) = (Operator::new(edited.source)?, Operator::new(edited.own)?);
            stretches.push(Stretch { steps: pair[0]..pair[1], source, own });
        }
        Ok(stretches)
    }

    /// The rows to edit and their sources.
    fn rows(&self, lanes: Option<&Lanes>) -> Result<(Vec<i64>, Vec<i64>)> {
        let Some(lanes) = lanes else {
            return Err(Error::value("lanes of a pass with attention edits", "one a row", "none"));
        };
        let (rows, sources) = lanes.pairs(self.source, self.edit);
        let of_edit = (0i64..).zip(lanes.rows()).filter(|(_, lane)| lane.condition == self.edit);
        if let Some((row, lane)) = of_edit.into_iter().find(|(row, _)| !rows.contains(row)) {
            let what = format!("source of row {row} (sample {}, variant {})", lane.sample, lane.variant);
            return Err(Error::value(what, format!("a row of condition {}", self.source), "none"));
        }
        Ok((rows, sources))
    }
}

impl Control for PromptToPrompt {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.clone())
    }

    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Attention, &self.selector)?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }

    fn attention(&self, at: At<'_>, attn: Attn, next: Next<'_>) -> Result<Tensor> {
        let Some(stretch) = self.stretches.iter().find(|stretch| stretch.steps.contains(&at.pass.step))
        else {
            return next.run(attn);
        };
        let (batch, _, queries, _) = attn.q.size4()?;
        let (_, _, keys, _) = attn.v.size4()?;
        if queries > self.positions {
            return next.run(attn);
        }
        let (rows, sources) = self.rows(at.pass.lanes)?;
        if rows.is_empty() {
            return next.run(attn);
        }
        if let Some(n) = self.chain.iter().find_map(|(edit, _)| edit.tokens())
            && i64::try_from(n) != Ok(keys)
        {
            return Err(Error::value("tokens of an attention edit", format!("{keys}, as there are keys"), n));
        }
        if let (Operator::Zero, Operator::Identity) = (&stretch.source, &stretch.own) {
            return next.run(attn);
        }
        let index = tensor(&rows, &attn)?;
        let edited = |operator: &Operator| operator.apply(&attn.v.f_index_select(0, &index)?);
        let values = |operator: &Operator| match operator {
            Operator::Identity => Ok(attn.v.shallow_clone()),
            operator => Ok::<_, Error>(attn.v.f_index_copy(0, &index, &edited(operator)?)?),
        };
        if let Operator::Zero = stretch.source {
            let v = values(&stretch.own)?;
            return next.run(Attn { v, ..attn });
        }
        // Each row's own number, that of its source for edited ones.
        let mut followed: Vec<i64> = (0..batch).collect();
        for (&row, &source) in rows.iter().zip(&sources) {
            followed[usize::try_from(row).unwrap_or(0)] = source;
        }
        let followed = tensor(&followed, &attn)?;
        let out = next.run(Attn {
            q: attn.q.f_index_select(0, &followed)?,
            k: attn.k.f_index_select(0, &followed)?,
            v: values(&stretch.source)?,
            mask: attn.mask.select(batch, &followed)?,
            scale: attn.scale,
        })?;
        if let Operator::Zero = stretch.own {
            return Ok(out);
        }
        let own = Attn { v: edited(&stretch.own)?, ..attn.select(&rows)? };
        Ok(out.f_index_add(0, &index, &next.run_rows(&rows, own)?)?)
    }
}

/// Numbers of rows, where the attention is computed.
fn tensor(rows: &[i64], attn: &Attn) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(rows)?.f_to_device(attn.v.device())?)
}

impl Operator {
    fn new(columns: Columns) -> Result<Self> {
        Ok(match columns {
            Columns::Zero => Self::Zero,
            Columns::Identity => Self::Identity,
            Columns::Diagonal(w) => Self::Diagonal(Tensor::f_from_slice(&w)?.f_unsqueeze(1)?.into()),
            Columns::Matrix { n, entries } => {
                let n = i64::try_from(n).unwrap_or(i64::MAX);
                Self::Matrix(Tensor::f_from_slice(&entries)?.f_view([n, n])?.into())
            }
        })
    }

    /// P v, `[R, kv_heads, N, d]`.
    fn apply(&self, v: &Tensor) -> Result<Tensor> {
        let like = |t: &Tensor| -> Result<Tensor> { Ok(t.f_to_device(v.device())?.f_to_kind(v.f_kind()?)?) };
        Ok(match self {
            Self::Zero => v.f_zeros_like()?,
            Self::Identity => v.shallow_clone(),
            Self::Diagonal(w) => v.f_mul(&like(w)?)?,
            Self::Matrix(m) => like(m)?.f_matmul(v)?,
        })
    }
}
