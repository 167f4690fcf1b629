//! What a picture shows, found without learning.
//!
//! The background is what most of the pixels at the edge are nearest to; its shade is their median. An object of kind k (shape,
//! size, fill) with mask m, centre c and colour e (less the background's) explains of the picture d (less the background)
//!
//! ```text
//! Σ_p |d_p|² − |d_p − m_p e|² = 2 Σ_p m_p d_p · e − |e|² Σ_p m_p²
//! ```
//!
//! of its |e|² Σ_p m_p²; the sums over all centres are correlations of the picture with the masks. The object that explains
//! most is taken away with all that lies under it, as objects of this world do not overlap, until none is left that explains
//! enough of itself.

use controlgen_core::energy::checks;
use controlgen_core::{Error, Result};
use tch::{Kind, Tensor};

use super::caption::{Named, NamedObject};
use super::render::Mask;
use super::scene::{Background, Color, Fill, Object, SIDE, Scene, Shape, Size, pixels};

/// How much of itself an object has to explain.
const ENOUGH: f64 = 0.5;

/// How many objects are looked for.
const MOST: usize = 4;

/// A kind of object: a mask around a centre that lies at `offset` of its pixel.
#[derive(Clone, Copy)]
struct Template {
    shape: Shape,
    size: Size,
    fill: Fill,
    offset: [f64; 2],
}

/// Reads pictures of one size.
pub struct Reader {
    size: i64,
    reach: i64,
    templates: Vec<Template>,
    /// The masks, `[K, 1, 2 R, 2 R]`.
    masks: Tensor,
    /// Σ m² of what lies in the picture, by kind and centre, `[K, S, S]`.
    energies: Tensor,
}

impl Reader {
    /// Of pictures with `size` pixels along a side. Centres are whole pixels of a 32×32 picture.
    ///
    /// # Errors
    /// [`Error::Value`] for a size that is neither 16 nor a multiple of 32 up to 128.
    pub fn new(size: i64) -> Result<Self> {
        if size != 16 && (size < SIDE || size % SIDE != 0 || size > 4 * SIDE) {
            return Err(Error::value("size of a picture that is read", "16, 32, 64, 96 or 128", size));
        }
        let scale = size as f64 / SIDE as f64;
        let offsets: &[f64] = if size < SIDE { &[0.0, 0.5] } else { &[0.0] };
        let mut templates = Vec::new();
        for (&shape, &size) in Shape::ALL.iter().flat_map(|shape| Size::ALL.iter().map(move |s| (shape, s))) {
            for (&fill, &x) in Fill::ALL.iter().flat_map(|fill| offsets.iter().map(move |x| (fill, x))) {
                templates.extend(offsets.iter().map(|&y| Template { shape, size, fill, offset: [x, y] }));
            }
        }
        let mask = |t: &Template| Mask::new(t.shape, t.size, t.fill, t.offset, scale);
        let masks: Vec<Mask> = templates.iter().map(mask).collect();
        let reach = masks.iter().map(|mask| mask.reach).max().unwrap_or(1);
        let masks = masks
            .iter()
            .map(|mask| {
                let (side, rim) = (2 * mask.reach, reach - mask.reach);
                let mask = Tensor::f_from_slice(&mask.shares)?.f_view([1, side, side])?;
                Ok(mask.f_constant_pad_nd([rim, rim, rim, rim])?)
            })
            .collect::<Result<Vec<_>>>()?;
        let masks = Tensor::f_stack(&masks, 0)?; // (K, 1, 2 R, 2 R)
        let ones = Tensor::f_ones([1, 1, size, size], (Kind::Float, masks.device()))?;
        let energies = correlation(&ones, &masks.f_square()?, reach)?.f_squeeze_dim(0)?;
        Ok(Self { size, reach, templates, masks, energies })
    }

    /// What pictures show, f32 `[B, 3, S, S]` in −1 ..= 1: the objects in the order of how much they explain.
    ///
    /// # Errors
    /// [`Error::Shape`] for another shape; [`Error::NotFinite`] for what is no number.
    pub fn read(&self, pictures: &Tensor) -> Result<Vec<Scene>> {
        let size = pictures.size();
        if size.len() != 4 || size[1..] != [3, self.size, self.size] {
            return Err(Error::shape("pictures", format!("[B, 3, {0}, {0}]", self.size), &size));
        }
        let _no_gradients = tch::no_grad_guard();
        let pictures = pictures.f_to_kind(Kind::Float)?.f_to_device(tch::Device::Cpu)?;
        checks::finite("pictures", &pictures)?;
        pictures.f_unbind(0)?.iter().map(|picture| self.scene(picture)).collect()
    }

    fn scene(&self, picture: &Tensor) -> Result<Scene> {
        let (background, behind) = background(picture)?;
        let behind = behind.f_view([3, 1, 1])?;
        let colors: Vec<f32> = Color::ALL.iter().flat_map(|color| pixels(color.rgb())).collect();
        let colors = Tensor::f_from_slice(&colors)?.f_view([-1, 3])?.f_sub(&behind.f_view([1, 3])?)?; // (8, 3)
        let whole = colors.f_square()?.f_sum_dim_intlist(&[1i64][..], true, Kind::Float)?; // (8, 1)
        let whole = whole.f_mul(&self.energies.f_view([1, -1])?)?; // (8, K S S)
        let mut rest = picture.f_sub(&behind)?;
        let mut objects = Vec::new();
        while objects.len() < MOST {
            let Some(found) = self.best(&rest, &colors, &whole)? else { break };
            rest = rest.f_mul(&found.1)?;
            objects.push(found.0);
        }
        Ok(Scene { background, objects })
    }

    /// The object that explains most, and 1 for pixels where it is not, `[1, S, S]`. `whole` is what each could explain,
    /// `[8, K S S]`.
    fn best(&self, rest: &Tensor, colors: &Tensor, whole: &Tensor) -> Result<Option<(Object, Tensor)>> {
        let sums = correlation(&rest.f_unsqueeze(1)?, &self.masks, self.reach)?; // (3, K, S, S)
        let explained = colors.f_matmul(&sums.f_view([3, -1])?)?.f_mul_scalar(2.0)?.f_sub(whole)?;
        let enough = explained.f_ge_tensor(&whole.f_mul_scalar(ENOUGH)?)?;
        let least = f64::NEG_INFINITY;
        let explained = explained.f_where_self(&enough, &Tensor::f_full_like(&explained, least)?)?;
        let best = explained.f_view([-1])?.f_argmax(0, false)?.f_int64_value(&[])?;
        if explained.f_view([-1])?.f_double_value(&[best])? <= 0.0 {
            return Ok(None);
        }
        let (size, kinds) = (self.size, self.templates.len() as i64);
        let (x, y) = (best.rem_euclid(size), best.div_euclid(size).rem_euclid(size));
        let kind = best.div_euclid(size * size).rem_euclid(kinds);
        let color = best.div_euclid(size * size * kinds);
        let Template { shape, size: large, fill, offset } = self.templates[kind as usize];
        let scale = size as f64 / SIDE as f64;
        let center = [(x as f64 + offset[0]) / scale, (y as f64 + offset[1]) / scale];
        let object = Object { shape, color: Color::ALL[color as usize], size: large, fill, center };
        // The mask at its place: cut from one with a margin of the whole picture.
        let margin = size;
        let mask = self.masks.f_get(kind)?.f_constant_pad_nd([margin, margin, margin, margin])?;
        let mask =
            mask.f_narrow(1, margin + self.reach - y, size)?.f_narrow(2, margin + self.reach - x, size)?;
        Ok(Some((object, mask.f_eq(0)?.f_to_kind(Kind::Float)?)))
    }
}

/// Σ over a mask `[K, 1, 2 R, 2 R]` around each pixel of planes `[N, 1, S, S]`: `[N, K, S, S]`.
fn correlation(planes: &Tensor, masks: &Tensor, reach: i64) -> Result<Tensor> {
    let size = planes.size()[2];
    let all = planes.f_conv2d(masks, None::<Tensor>, [1, 1], [reach, reach], [1, 1], 1)?;
    Ok(all.f_narrow(2, 0, size)?.f_narrow(3, 0, size)?.f_contiguous()?)
}

/// What most of the pixels at the edge are nearest to, and their median `[3]`.
fn background(picture: &Tensor) -> Result<(Background, Tensor)> {
    let size = picture.size()[1];
    let edges = [(1, 0), (1, size - 1), (2, 0), (2, size - 1)];
    let edges =
        edges.into_iter().map(|(dim, at)| Ok(picture.f_select(dim, at)?)).collect::<Result<Vec<_>>>()?;
    let edge = Tensor::f_cat(&edges, 1)?.f_unsqueeze(0)?; // (1, 3, 4 S)
    let all: Vec<f32> = Background::ALL.iter().flat_map(|value| pixels(value.rgb())).collect();
    let all = Tensor::f_from_slice(&all)?.f_view([-1, 3, 1])?;
    let far = edge.f_sub(&all)?.f_square()?.f_sum_dim_intlist(&[1i64][..], false, Kind::Float)?;
    let nearest: Vec<i64> = far.f_argmin(0, false)?.try_into()?;
    let votes = |value: &Background| nearest.iter().filter(|&&near| near == value.index() as i64).count();
    let most = Background::ALL.iter().copied().max_by_key(votes).unwrap_or(Background::White);
    let own: Vec<i64> =
        (0..).zip(&nearest).filter(|near| *near.1 == most.index() as i64).map(|n| n.0).collect();
    let shade = edge.f_squeeze_dim(0)?.f_index_select(1, &Tensor::f_from_slice(&own)?)?;
    Ok((most, shade.f_median_dim(1, false)?.0))
}

impl NamedObject {
    /// Whether an object is what was said of it.
    pub fn matches(&self, object: &Object) -> bool {
        (self.shape, self.color, self.fill) == (object.shape, object.color, object.fill)
            && self.size.is_none_or(|size| size == object.size)
    }
}

impl Named {
    /// Whether a scene shows all that was said, and no object more.
    pub fn holds_of(&self, scene: &Scene) -> bool {
        let holds = |objects: &[Object]| {
            let all = self.objects.iter().zip(objects).all(|(named, object)| named.matches(object));
            let position = super::positions(objects).first().copied();
            all && (self.position.is_none() || self.position == position)
        };
        let background = self.background.is_none_or(|background| background == scene.background);
        let mut turned = scene.objects.clone();
        turned.reverse();
        let objects = self.objects.len() == scene.objects.len();
        background && objects && (holds(&scene.objects) || holds(&turned))
    }
}
