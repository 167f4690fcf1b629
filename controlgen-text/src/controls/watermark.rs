//! A watermark: green lists.

use std::collections::HashSet;

use controlgen_core::{Error, Result, TokenControl};
use tch::Tensor;

use super::check;
use super::scores;

/// Adds δ to the scores of the *green* tokens, a share γ of the vocabulary that the tokens before decide: who knows the
/// key can tell that a text was made so ([`WatermarkDetector`]), without the model. Kirchenbauer, Geiping, Wen, Katz, Miers
/// and Goldstein, "A watermark for large language models" (ICML 2023), algorithm 2; with more than one token before,
/// "LeftHash" of Kirchenbauer et al., "On the reliability of watermarks for large language models" (ICLR 2024).
///
/// Where the paper takes exactly γV tokens, here each token is green by a hash of its own: of the key, the `context`
/// tokens before it, prompt included, and itself. So a detector needs neither the vocabulary nor its size. With m the
/// finaliser of SplitMix64 (Steele, Lea and Flood, 2014) and + without overflow,
///
/// ```text
/// s₀ = m(key),  sᵢ = m(sᵢ₋₁ + cᵢ + 1) for the tokens c₁ … c_h before;  v is green if m(s_h + v + 1) < γ 2⁶⁴
/// ```
///
/// These numbers change only with a new minor version (0.x) of this crate. Tokens with fewer than `context` before them
/// have no green ones. A wider context leaks less of the key, and is destroyed by an edit of any of its tokens.
///
/// *Cost*: a hash and an addition for each token of `[B, V]`, on the CPU.
///
/// ```no_run
/// use controlgen_core::{Placement, Result};
/// use controlgen_text::TextModel;
/// use controlgen_text::controls::{TopP, Watermark, WatermarkDetector};
///
/// # fn main() -> Result<()> {
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let watermark = Watermark::new(0xC0FFEE, 0.25, 2.0)?;
/// let generate = || model.generate("The best thing about the sea is").eos([]).max_new_tokens(60).sample(3);
/// let marked = generate().with(watermark).with(TopP::new(0.9)?).run()?;
/// let plain = generate().with(TopP::new(0.9)?).run()?;
/// for generation in [plain, marked] {
///     println!("{:?}", WatermarkDetector::new(watermark).detect(&generation.completions[0].ids)?);
/// }
/// // Detection { tokens: 58, green: 19, z: 1.364576478442026, p_value: 0.08619310089443014 }
/// // Detection { tokens: 48, green: 25, z: 4.333333333333333, p_value: 7.34342383689469e-6 }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Watermark {
    key: u64,
    gamma: f64,
    delta: f32,
    context: usize,
}

/// The most tokens a context may have.
const WIDEST: usize = 64;

impl Watermark {
    /// γ = `gamma` above 0 and below 1, δ = `delta` above 0 and at most 1000; the paper's are 0.25 to 0.5, and 2. One
    /// token of context. The key is the secret.
    ///
    /// # Errors
    /// [`Error::Value`] outside those ranges, and for NaN.
    pub fn new(key: u64, gamma: f64, delta: f64) -> Result<Self> {
        let gamma =
            check::number("watermark gamma", "above 0 and below 1", gamma, gamma > 0.0 && gamma < 1.0)?;
        let holds = delta > 0.0 && delta <= 1000.0;
        let delta = check::number("watermark delta", "above 0 and at most 1000", delta, holds)?;
        Ok(Self { key, gamma, delta: delta as f32, context: 1 })
    }

    /// The green list depends on this many tokens before it.
    ///
    /// # Errors
    /// [`Error::Value`] outside 1 ..= 64.
    pub fn context(self, tokens: usize) -> Result<Self> {
        if (1..=WIDEST).contains(&tokens) {
            Ok(Self { context: tokens, ..self })
        } else {
            Err(Error::value("watermark context", format!("1 ..= {WIDEST}"), tokens))
        }
    }

    /// Whether a token is green after these, of which the last `context` count; `None` where there are fewer.
    pub fn is_green(&self, before: &[i64], token: i64) -> Option<bool> {
        self.list(before).map(|list| list.holds(token))
    }

    fn list(&self, before: &[i64]) -> Option<GreenList> {
        let context = before.get(before.len().checked_sub(self.context)?..)?;
        let state = context.iter().fold(mix(self.key), |state, &token| mix(after(state, token)));
        // γ < 1, so the limit fits.
        Some(GreenList { state, limit: (self.gamma * 2f64.powi(64)) as u64 })
    }
}

/// The green tokens after a context.
struct GreenList {
    state: u64,
    limit: u64,
}

impl GreenList {
    fn holds(&self, token: i64) -> bool {
        mix(after(self.state, token)) < self.limit
    }
}

fn after(state: u64, token: i64) -> u64 {
    state.wrapping_add(token as u64).wrapping_add(1)
}

/// SplitMix64's step: a constant is added, so that 0 is not mapped to itself, and the bits are mixed.
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl TokenControl for Watermark {
    /// The last tokens of each row.
    type State = Vec<Vec<i64>>;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<Self::State> {
        scores::start_rows(prompts, |prompt| prompt[prompt.len().saturating_sub(self.context)..].to_vec())
    }

    fn score(&self, state: &mut Self::State, mut logits: Tensor) -> Result<Tensor> {
        let vocab = scores::vocab(&logits, state.len())?;
        let mut biases = Vec::with_capacity(logits.numel());
        for before in state.iter() {
            match self.list(before) {
                None => biases.extend((0..vocab).map(|_| 0.0)),
                Some(list) => {
                    let bias = |token| if list.holds(token) { self.delta } else { 0.0 };
                    biases.extend((0..vocab).map(bias));
                }
            }
        }
        let biases = Tensor::f_from_slice(&biases)?.f_view_as(&logits)?.f_to_device(logits.device())?;
        let _ = logits.f_add_(&biases)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut Self::State, tokens: &[i64]) -> Result<()> {
        scores::advance_rows(state, tokens, |before, token| {
            if before.len() == self.context {
                before.remove(0);
            }
            before.push(token);
        })
    }
}

/// Tells whether a text was generated under a [`Watermark`] of a certain key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WatermarkDetector {
    watermark: Watermark,
    repeated: bool,
}

/// What a detector finds in a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Detection {
    /// Tokens that were looked at, T.
    pub tokens: usize,
    /// How many of them are green.
    pub green: usize,
    /// (green − γT) / √(T γ (1 − γ)): of unmarked text it is standard normal.
    pub z: f64,
    /// The probability of a z at least as large if the text is unmarked, 1 − Φ(z).
    pub p_value: f64,
}

impl WatermarkDetector {
    /// For texts under this watermark; δ is of no account.
    pub fn new(watermark: Watermark) -> Self {
        Self { watermark, repeated: false }
    }

    /// Counts a token each time that it comes after the same ones. Unless said, once: else a text that repeats itself
    /// counts one draw several times, and z has more than its share of large values.
    #[must_use]
    pub fn count_repeated(self) -> Self {
        Self { repeated: true, ..self }
    }

    /// Looks for the watermark in the tokens of a text: those with enough tokens before them in the text itself. Add the
    /// prompt's last tokens in front, if they are known, and the first tokens count too.
    ///
    /// A test of equation 3 of the paper; good for T of a few tens or more.
    ///
    /// # Errors
    /// [`Error::Value`] for a text of no more tokens than the context.
    pub fn detect(&self, tokens: &[i64]) -> Result<Detection> {
        let width = self.watermark.context + 1;
        let mut seen = HashSet::new();
        let windows = tokens.windows(width).filter(|window| self.repeated || seen.insert(*window));
        let (mut total, mut green) = (0usize, 0usize);
        for (token, before) in windows.filter_map(<[i64]>::split_last) {
            total += 1;
            green += usize::from(self.watermark.is_green(before, *token) == Some(true));
        }
        if total == 0 {
            return Err(Error::value(
                "tokens of a watermarked text",
                format!("at least {width}"),
                tokens.len(),
            ));
        }
        let (n, gamma) = (total as f64, self.watermark.gamma);
        let z = (green as f64 - gamma * n) / (n * gamma * (1.0 - gamma)).sqrt();
        let p_value = 0.5 * libm::erfc(z * std::f64::consts::FRAC_1_SQRT_2);
        Ok(Detection { tokens: total, green, z, p_value })
    }
}
