//! What an image was made with, inside its file.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use controlgen_core::{Error, Result};
use serde_json::{Map, Value};

/// The keyword of the text chunk.
pub(super) const KEYWORD: &str = "parameters";

/// The longest text that is unpacked, in bytes.
const LONGEST: usize = 1 << 24;

/// What an image was made with: a JSON object in the PNG file's text chunk `parameters` (iTXt, UTF-8). What is `None`
/// is not written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters {
    /// The prompt.
    pub prompt: Option<String>,
    /// What was to be avoided.
    pub negative_prompt: Option<String>,
    /// How many steps the sampler took.
    pub steps: Option<u64>,
    /// The factor of classifier-free guidance. One that is not finite is not written.
    pub guidance_scale: Option<f64>,
    /// The seed of the image's noise.
    pub seed: Option<u64>,
    /// The sampler.
    pub sampler: Option<String>,
    /// The height in pixels.
    pub height: Option<u64>,
    /// The width in pixels.
    pub width: Option<u64>,
    /// The model: a name or a directory.
    pub model: Option<String>,
    /// Anything else, by names other than those above, which have precedence.
    pub more: Map<String, Value>,
}

impl Parameters {
    /// The JSON text.
    pub fn to_json(&self) -> String {
        let text = |text: &Option<String>| text.as_deref().map(Value::from);
        let named = [
            ("prompt", text(&self.prompt)),
            ("negative_prompt", text(&self.negative_prompt)),
            ("steps", self.steps.map(Value::from)),
            ("guidance_scale", self.guidance_scale.filter(|scale| scale.is_finite()).map(Value::from)),
            ("seed", self.seed.map(Value::from)),
            ("sampler", text(&self.sampler)),
            ("height", self.height.map(Value::from)),
            ("width", self.width.map(Value::from)),
            ("model", text(&self.model)),
        ];
        let mut fields: Map<String, Value> =
            named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
        for (name, value) in &self.more {
            let _ = fields.entry(name).or_insert_with(|| value.clone());
        }
        Value::Object(fields).to_string()
    }

    /// Reads the JSON text; `path` names it in errors.
    ///
    /// # Errors
    /// [`Error::Format`] for no JSON object, or a field of another type.
    pub fn from_json(path: impl AsRef<Path>, text: &str) -> Result<Self> {
        let path = path.as_ref();
        let mut more: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| Error::format(path, format!("`{KEYWORD}`: expected a JSON object: {error}")))?;
        let mut take = |name: &str| more.shift_remove(name).filter(|value| !value.is_null());
        let wrong = |name: &str, expected: &str, found: &Value| {
            Error::format(path, format!("`{KEYWORD}`: field `{name}`: expected {expected}, found {found}"))
        };
        let mut text = |name: &str| match take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(name, "a string", &other)),
        };
        let (prompt, negative_prompt) = (text("prompt")?, text("negative_prompt")?);
        let (sampler, model) = (text("sampler")?, text("model")?);
        let mut whole = |name: &str| match take(name) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| wrong(name, "a whole number >= 0", &value)),
        };
        let (steps, seed) = (whole("steps")?, whole("seed")?);
        let (height, width) = (whole("height")?, whole("width")?);
        let guidance_scale = match take("guidance_scale") {
            None => None,
            Some(value) => Some(value.as_f64().ok_or_else(|| wrong("guidance_scale", "a number", &value))?),
        };
        Ok(Self { prompt, negative_prompt, steps, guidance_scale, seed, sampler, height, width, model, more })
    }
}

/// The parameters inside a PNG file; `None` where it holds none.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a file that is no PNG, and parameters that are no JSON object.
pub fn load_parameters(path: impl AsRef<Path>) -> Result<Option<Parameters>> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|error| Error::io(path, error))?;
    let broken = |error: png::DecodingError| Error::format(path, error);
    let mut reader = png::Decoder::new(BufReader::new(file)).read_info().map_err(broken)?;
    reader.finish().map_err(broken)?; // chunks may also stand after the pixels
    let info = reader.info();
    if let Some(chunk) = info.utf8_text.iter().find(|chunk| chunk.keyword == KEYWORD) {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(LONGEST).map_err(broken)?;
        return Parameters::from_json(path, &chunk.get_text().map_err(broken)?).map(Some);
    }
    let latin = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == KEYWORD);
    latin.map(|chunk| Parameters::from_json(path, &chunk.text)).transpose()
}
