//! What the images of a run are to be of.

use controlgen_core::{Error, ImageRequest, Result};

/// Images of a run, at most.
pub(super) const MOST: usize = 1 << 20;

/// Prompts, and what is to be avoided: one image a prompt, or several.
///
/// ```
/// use controlgen_diffusion::pipelines::Prompts;
///
/// let prompts = Prompts::new(["a lighthouse at dawn", "a cat"]).negative("blurry").images(2);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompts {
    pub(super) prompts: Vec<String>,
    /// None, one for all, or one a prompt.
    pub(super) negatives: Vec<Option<String>>,
    pub(super) images: usize,
    /// Height and width that the images are said to have had before they were cut to size: SDXL.
    pub(super) original_size: Option<[i64; 2]>,
    /// Where they are said to have been cut, from the top left: SDXL.
    pub(super) crop: [i64; 2],
}

impl Prompts {
    /// These prompts; an empty one is the prompt of nothing in particular.
    pub fn new<S: Into<String>>(prompts: impl IntoIterator<Item = S>) -> Self {
        let prompts = prompts.into_iter().map(Into::into).collect();
        Self { prompts, negatives: Vec::new(), images: 1, original_size: None, crop: [0, 0] }
    }

    /// What is to be avoided in all images: classifier-free guidance leads away from it. Without it, from the empty
    /// prompt, or from zeros where the pipeline says so (`force_zeros_for_empty_prompt`).
    #[must_use]
    pub fn negative(self, prompt: impl Into<String>) -> Self {
        Self { negatives: vec![Some(prompt.into())], ..self }
    }

    /// What is to be avoided, one a prompt.
    #[must_use]
    pub fn negatives<S: Into<String>>(self, prompts: impl IntoIterator<Item = S>) -> Self {
        Self { negatives: prompts.into_iter().map(|prompt| Some(prompt.into())).collect(), ..self }
    }

    /// So many images a prompt, one after the other; 1 unless said.
    #[must_use]
    pub fn images(self, images: usize) -> Self {
        Self { images, ..self }
    }

    /// The height and width that SDXL is told the images had before they were cut; their size unless said.
    #[must_use]
    pub fn original_size(self, height: i64, width: i64) -> Self {
        Self { original_size: Some([height, width]), ..self }
    }

    /// Where SDXL is told they were cut: the top and the left; 0 and 0 unless said.
    #[must_use]
    pub fn crop(self, top: i64, left: i64) -> Self {
        Self { crop: [top, left], ..self }
    }

    /// How many images there are to be.
    pub(super) fn count(&self) -> Result<usize> {
        let (prompts, negatives) = (self.prompts.len(), self.negatives.len());
        if negatives > 1 && negatives != prompts {
            return Err(Error::value("negative prompts", format!("none, one or {prompts}"), negatives));
        }
        match prompts.checked_mul(self.images) {
            Some(images) if (1..=MOST).contains(&images) => Ok(images),
            _ => {
                let found = format!("{prompts} prompts, {} images each", self.images);
                let expected = format!("at least one, of at least one image, and at most {MOST} images");
                Err(Error::value("prompts", expected, found))
            }
        }
    }

    /// The prompt of an image.
    pub(super) fn prompt(&self, image: usize) -> &str {
        self.prompts.get(image.checked_div(self.images).unwrap_or(0)).map_or("", String::as_str)
    }

    /// What is to be avoided in an image, where it was said.
    pub(super) fn negative_of(&self, image: usize) -> Option<&str> {
        let of = if self.negatives.len() == 1 { 0 } else { image.checked_div(self.images).unwrap_or(0) };
        self.negatives.get(of)?.as_deref()
    }
}

/// Texts, each once.
#[derive(Default)]
pub(super) struct Distinct<'a>(pub(super) Vec<&'a str>);

impl<'a> Distinct<'a> {
    /// The place of a text.
    pub(super) fn place(&mut self, text: &'a str) -> usize {
        self.0.iter().position(|known| *known == text).unwrap_or_else(|| {
            self.0.push(text);
            self.0.len() - 1
        })
    }
}

impl From<&str> for Prompts {
    fn from(prompt: &str) -> Self {
        Self::new([prompt])
    }
}

impl From<String> for Prompts {
    fn from(prompt: String) -> Self {
        Self::new([prompt])
    }
}

/// One image a request; their seeds go to [`Seeds::Each`](super::Seeds::Each).
impl From<&[ImageRequest]> for Prompts {
    fn from(requests: &[ImageRequest]) -> Self {
        let prompts = Self::new(requests.iter().map(|request| request.prompt.as_str()));
        // None was said where it is empty, whatever the others say.
        let said =
            |request: &ImageRequest| Some(request.negative_prompt.clone()).filter(|text| !text.is_empty());
        Self { negatives: requests.iter().map(said).collect(), ..prompts }
    }
}
