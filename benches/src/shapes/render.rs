//! Scenes to pictures.
//!
//! A pixel is the mean of 4×4 sub-samples, each of which is an object's or the background's. An object's share of a pixel
//! depends on where its centre lies within one only, so that it is counted once and then moved.

use std::f64::consts::PI;

use controlgen_core::{Error, Result};
use tch::Tensor;

use super::scene::{Fill, Object, SIDE, Scene, Shape, Size, pixels};

/// Sub-samples along a side of a pixel.
const SAMPLES: i64 = 4;

/// The largest picture, in pixels along a side.
const LARGEST: i64 = 1024;

/// Whether a point of the local coordinates, u to the right and v downwards, in radii, is the shape's.
fn inside(shape: Shape, u: f64, v: f64) -> bool {
    match shape {
        Shape::Circle => u * u + v * v <= 0.97 * 0.97,
        Shape::Square => u.abs().max(v.abs()) <= 0.86,
        Shape::Triangle => within(&[[0.0, -1.0], [1.0, 0.85], [-1.0, 0.85]], u, v),
        Shape::Diamond => u.abs() + v.abs() <= 1.05,
        Shape::Cross => {
            let (short, long) = (u.abs().min(v.abs()), u.abs().max(v.abs()));
            short <= 0.34 && long <= 1.0
        }
        Shape::Star => {
            let corner = |k: i32| {
                let radius = if k % 2 == 0 { 1.05 } else { 0.45 };
                let (sin, cos) = (PI * f64::from(k) / 5.0).sin_cos();
                [radius * sin, -radius * cos]
            };
            within(&std::array::from_fn::<_, 10, _>(|k| corner(k as i32)), u, v)
        }
    }
}

/// Whether a point is in a polygon: a ray from it crosses the outline an odd number of times.
fn within(corners: &[[f64; 2]], u: f64, v: f64) -> bool {
    let ends = corners.iter().cycle().skip(1);
    let crossed = |([x1, y1], [x2, y2]): (&[f64; 2], &[f64; 2])| {
        (*y1 > v) != (*y2 > v) && u < (x2 - x1) * (v - y1) / (y2 - y1) + x1
    };
    corners.iter().zip(ends).filter(|&edge| crossed(edge)).count() % 2 == 1
}

/// An object's share of the pixels around its centre.
#[derive(Clone)]
pub(super) struct Mask {
    /// Pixels from the centre's to the first row and column.
    pub reach: i64,
    /// `[2 · reach, 2 · reach]` in 0 ..= 1.
    pub shares: Vec<f32>,
}

impl Mask {
    /// Around a centre that lies at `[x, y]` of its pixel, in 0 .. 1, with `scale` pixels to one of a 32×32 picture.
    pub(super) fn new(shape: Shape, size: Size, fill: Fill, [x, y]: [f64; 2], scale: f64) -> Self {
        let radius = size.radius();
        let reach = (1.05 * radius * scale).ceil() as i64 + 1;
        let at = |pixel: i64, sample: i64, centre: f64| {
            (pixel as f64 + (sample as f64 + 0.5) / SAMPLES as f64 - centre) / scale
        };
        let share = |row: i64, column: i64| {
            let mut count = 0u8;
            for (i, k) in (0..SAMPLES).flat_map(|i| (0..SAMPLES).map(move |k| (i, k))) {
                let (dx, dy) = (at(column, k, x), at(row, i, y));
                let coloured = fill == Fill::Solid || (dy + 1.0).rem_euclid(4.0) < 2.0;
                count += u8::from(coloured && inside(shape, dx / radius, dy / radius));
            }
            f32::from(count) / (SAMPLES * SAMPLES) as f32
        };
        let side = -reach..reach;
        let shares = side.clone().flat_map(|row| side.clone().map(move |column| share(row, column)));
        Self { reach, shares: shares.collect() }
    }
}

/// The masks of all objects, around centres that are whole or half pixels of a 32×32 picture.
#[derive(Clone)]
struct Masks {
    size: i64,
    /// How many places within a pixel a centre may have along a side.
    phases: i64,
    masks: Vec<Mask>,
}

impl Masks {
    fn new(size: i64) -> Result<Self> {
        if size < 16 || size % 16 != 0 || size > LARGEST {
            return Err(Error::value("size of a picture", format!("a multiple of 16 <= {LARGEST}"), size));
        }
        // Half-pixels of a 32×32 picture are size / 64 pixels.
        let phases = [1, 2].into_iter().find(|phases| phases * size % (2 * SIDE) == 0).unwrap_or(4);
        let scale = size as f64 / SIDE as f64;
        let mut masks = Vec::new();
        for (&shape, &size) in Shape::ALL.iter().flat_map(|shape| Size::ALL.iter().map(move |s| (shape, s))) {
            for &fill in Fill::ALL {
                for (x, y) in (0..phases).flat_map(|x| (0..phases).map(move |y| (x, y))) {
                    let centre = [x, y].map(|phase| phase as f64 / phases as f64);
                    masks.push(Mask::new(shape, size, fill, centre, scale));
                }
            }
        }
        Ok(Self { size, phases, masks })
    }

    /// The mask of an object, and the pixel `[x, y]` that its centre lies in: rounded to half pixels.
    fn of(&self, object: &Object) -> (&Mask, [i64; 2]) {
        let halves = object.center.map(|c| (2.0 * c).round() as i64 * self.size);
        let pixel = halves.map(|h| h.div_euclid(2 * SIDE));
        let [x, y] = halves.map(|h| (h.rem_euclid(2 * SIDE) * self.phases).div_euclid(2 * SIDE) as usize);
        let kind = (object.shape.index() * 2 + object.size.index()) * 2 + object.fill.index();
        let phases = self.phases as usize;
        (&self.masks[(kind * phases + x) * phases + y], pixel)
    }
}

/// Makes pictures of one size.
#[derive(Clone)]
pub struct Renderer {
    masks: Masks,
}

impl Renderer {
    /// Of pictures with `size` pixels along a side.
    ///
    /// # Errors
    /// [`Error::Value`] for a size that is no multiple of 16 up to 1024.
    pub fn new(size: i64) -> Result<Self> {
        Ok(Self { masks: Masks::new(size)? })
    }

    /// Pixels along a side.
    pub fn size(&self) -> i64 {
        self.masks.size
    }

    /// Pictures of the scenes, f32 `[B, 3, S, S]` on the CPU, pixels in −1 ..= 1. Centres are rounded to half pixels of a
    /// 32×32 picture; what lies outside the picture is cut off.
    ///
    /// # Errors
    /// LibTorch's.
    pub fn render(&self, scenes: &[Scene]) -> Result<Tensor> {
        let size = self.masks.size as usize;
        let mut values = vec![0.0; scenes.len() * 3 * size * size];
        for (scene, picture) in scenes.iter().zip(values.chunks_exact_mut(3 * size * size)) {
            self.draw(scene, picture);
        }
        let shape = [scenes.len() as i64, 3, self.masks.size, self.masks.size];
        Ok(Tensor::f_from_slice(&values)?.f_view(shape)?)
    }

    /// One picture, three planes.
    fn draw(&self, scene: &Scene, picture: &mut [f32]) {
        let size = self.masks.size;
        let plane = (size * size) as usize;
        for (level, plane) in pixels(scene.background.rgb()).into_iter().zip(picture.chunks_exact_mut(plane))
        {
            plane.fill(level);
        }
        for object in &scene.objects {
            let (mask, [x, y]) = self.masks.of(object);
            let side = 2 * mask.reach;
            // The columns of the mask that lie in the picture.
            let (left, top) = (x - mask.reach, y - mask.reach);
            let (from, to) = ((-left).clamp(0, side), (size - left).clamp(0, side));
            let color = pixels(object.color.rgb());
            for row in (0..side).filter(|row| (0..size).contains(&(top + row))) {
                let shares = &mask.shares[(row * side + from) as usize..(row * side + to) as usize];
                for (level, plane) in color.into_iter().zip(picture.chunks_exact_mut(plane)) {
                    let start = ((top + row) * size + left + from) as usize;
                    for (pixel, share) in plane[start..].iter_mut().zip(shares) {
                        *pixel += share * (level - *pixel);
                    }
                }
            }
        }
    }
}
