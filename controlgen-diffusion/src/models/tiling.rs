//! Images in tiles that overlap, so that memory does not grow with their size.

use controlgen_core::{Error, Result};
use tch::{Kind, Tensor};

/// Tiles of an autoencoder, in latents along each side: where two overlap, the weight goes linearly from one to the
/// other. diffusers' `enable_tiling` with the same sizes gives the same picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    tile: i64,
    overlap: i64,
}

impl Default for Tiling {
    /// Tiles of 64 that overlap by 16: 512 pixels and a quarter of them, as diffusers has them for Stable Diffusion 1.
    fn default() -> Self {
        Self { tile: 64, overlap: 16 }
    }
}

impl Tiling {
    /// Tiles of this side, which overlap by so many latents: fewer than a tile has, so that the next begins further on.
    ///
    /// # Errors
    /// [`Error::Value`] for a tile below 1, an overlap below 0 or not below the tile.
    pub fn new(tile: i64, overlap: i64) -> Result<Self> {
        if tile < 1 || overlap < 0 || overlap >= tile {
            let found = format!("{tile} and {overlap}");
            return Err(Error::value("tile and overlap", "0 <= overlap < tile", found));
        }
        Ok(Self { tile, overlap })
    }

    /// The side of a tile, in latents.
    pub fn tile(self) -> i64 {
        self.tile
    }

    /// By how many latents tiles overlap.
    pub fn overlap(self) -> i64 {
        self.overlap
    }

    /// What `run` makes of images, `f` pixels a latent, tile by tile.
    pub(super) fn encode(
        self,
        x: &Tensor,
        f: i64,
        run: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.run(x, [f, 1], run)
    }

    /// What `run` makes of latents, `f` pixels a latent, tile by tile.
    pub(super) fn decode(
        self,
        x: &Tensor,
        f: i64,
        run: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.run(x, [1, f], run)
    }

    /// `[B, I, H, W] → [B, O, H', W']`, with so many numbers a latent going in and coming out.
    fn run(
        self,
        x: &Tensor,
        [read, made]: [i64; 2],
        run: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (_, _, height, width) = x.size4()?;
        let (tile, step) = (self.tile * read, (self.tile - self.overlap) * read);
        let (kept, overlap) = ((self.tile - self.overlap) * made, self.overlap * made);
        if height <= tile && width <= tile {
            return run(x);
        }
        let starts = |n: i64| (0..n).step_by(usize::try_from(step).unwrap_or(usize::MAX));
        let (mut rows, mut above): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for top in starts(height) {
            let (mut row, mut below, mut left): (Vec<Tensor>, Vec<Tensor>, Option<Tensor>) =
                (Vec::new(), Vec::new(), None);
            let strip = x.f_narrow(2, top, tile.min(height - top))?;
            for (i, start) in starts(width).enumerate() {
                let mut y = run(&strip.f_narrow(3, start, tile.min(width - start))?)?;
                if let Some(above) = above.get(i) {
                    y = blend(above, &y, 2)?;
                }
                if let Some(left) = &left {
                    y = blend(left, &y, 3)?;
                }
                // Copies, which let go of the tile.
                below.push(end(&y, 2, overlap)?);
                left = Some(end(&y, 3, overlap)?);
                let part = y.f_narrow(2, 0, kept.min(y.size()[2]))?.f_narrow(3, 0, kept.min(y.size()[3]))?;
                row.push(copy(&part)?);
            }
            rows.push(Tensor::f_cat(&row, 3)?);
            above = below;
        }
        Ok(Tensor::f_cat(&rows, 2)?)
    }
}

/// A copy of the last `n` of a dimension, or of all where there are fewer.
fn end(y: &Tensor, dim: i64, n: i64) -> Result<Tensor> {
    let size = y.size()[usize::try_from(dim).unwrap_or(0)];
    copy(&y.f_narrow(dim, size - n.min(size), n.min(size))?)
}

/// The same numbers in memory of their own; a graph goes on through it.
fn copy(t: &Tensor) -> Result<Tensor> {
    Ok(t.f_add_scalar(0.0)?)
}

/// b, whose beginning along a dimension goes over from the end of a: a (1 − i / n) + b i / n.
fn blend(a: &Tensor, b: &Tensor, dim: i64) -> Result<Tensor> {
    let index = usize::try_from(dim).unwrap_or(0);
    let (from, to) = (a.size()[index], b.size()[index]);
    let n = from.min(to);
    if n == 0 {
        return Ok(b.shallow_clone());
    }
    let mut shape = [1; 4];
    shape[index] = n;
    let weight = Tensor::f_arange(n, (Kind::Float, b.device()))?.f_div_scalar(n as f64)?;
    let weight = weight.f_to_kind(b.f_kind()?)?.f_view(shape)?;
    let head = a.f_narrow(dim, from - n, n)?.f_lerp_tensor(&b.f_narrow(dim, 0, n)?, &weight)?;
    if n == to {
        return Ok(head);
    }
    Ok(Tensor::f_cat(&[head, b.f_narrow(dim, n, to - n)?], dim)?)
}
