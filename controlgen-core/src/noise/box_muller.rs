//! Uniforms to normals, in the arithmetic of PyTorch's CPU kernels.
//!
//! Box and Muller, "A note on the generation of random normal deviates", Ann. Math. Statist. 29(2), 1958:
//! for u1 in (0, 1] and u2 in [0, 1), r = sqrt(−2 ln u1) and θ = 2π u2 give r cos θ and r sin θ.
//!
//! Equal bits need equal roundings, so each precision is written as PyTorch computes it. In `f32` PyTorch has
//! two ways, [`vector`] (x86 with AVX2: polynomials and fused multiply-adds) and [`scalar`] (other machines:
//! the C library), which differ in the last bits. [`vector`] is pure arithmetic, the same everywhere.

use std::f64::consts::PI;

use half::{bf16, f16};

/// A pair of normals from a pair of uniforms in [0, 1), double precision, by the C library's functions.
pub(super) fn double(u1: f64, u2: f64) -> (f64, f64) {
    let radius = (-2.0 * (1.0 - u1).ln()).sqrt();
    let theta = 2.0 * PI * u2;
    (radius * theta.cos() + 0.0, radius * theta.sin() + 0.0)
}

/// As [`double`], but from a pair drawn one by one: the roles of the uniforms are swapped, ln(1 − u) is
/// `log1p`.
pub(super) fn one_by_one(u1: f64, u2: f64) -> (f64, f64) {
    let radius = (-2.0 * (-u2).ln_1p()).sqrt();
    let theta = 2.0 * PI * u1;
    (radius * theta.cos() + 0.0, radius * theta.sin())
}

/// Single precision by the C library's functions; the angle is multiplied out in double precision.
pub(super) fn scalar(u1: f32, u2: f32) -> (f32, f32) {
    let radius = (-2.0 * (1.0 - u1).ln()).sqrt();
    let theta = (2.0 * PI * f64::from(u2)) as f32;
    (radius * theta.cos() + 0.0, radius * theta.sin() + 0.0)
}

/// Half precision: every intermediate result is computed in `f32` and rounded to half.
pub(super) fn half(u1: f16, u2: f16) -> (f16, f16) {
    let (a, b) = rounded(u1.to_f32(), u2.to_f32(), |x| f16::from_f32(x).to_f32());
    (f16::from_f32(a), f16::from_f32(b))
}

/// bfloat16: every intermediate result is computed in `f32` and rounded to bfloat16.
pub(super) fn bfloat(u1: bf16, u2: bf16) -> (bf16, bf16) {
    let (a, b) = rounded(u1.to_f32(), u2.to_f32(), |x| bf16::from_f32(x).to_f32());
    (bf16::from_f32(a), bf16::from_f32(b))
}

fn rounded(u1: f32, u2: f32, round: impl Fn(f32) -> f32) -> (f32, f32) {
    let log = round(round(1.0 - u1).ln());
    let radius = round(round(-2.0 * log).sqrt());
    let theta = round((2.0 * PI * f64::from(u2)) as f32);
    let product = |x: f32| round(radius * round(x)) + 0.0;
    (product(theta.cos()), product(theta.sin()))
}

/// Single precision as the AVX2 kernel computes it, one lane of it.
///
/// The final + 0 stands for the kernel's `· std + mean` with std 1 and mean 0: it turns −0 into 0.
pub(super) fn vector(u1: f32, u2: f32) -> (f32, f32) {
    const TWO_PI: f32 = (2.0 * PI) as f32;
    let radius = (log(1.0 - u1) * -2.0).sqrt();
    let (sin, cos) = sin_cos(TWO_PI * u2);
    (radius * cos + 0.0, radius * sin + 0.0)
}

/// Coefficients of ln(1 + x) / x³ + …, Cephes `logf`, highest power first.
const LOG_P: [f32; 9] = [
    7.037_683_629_2e-2_f64 as f32,
    -1.151_461_031_0e-1_f64 as f32,
    1.167_699_874_0e-1_f64 as f32,
    -1.242_014_084_6e-1_f64 as f32,
    1.424_932_278_7e-1_f64 as f32,
    -1.666_805_766_5e-1_f64 as f32,
    2.000_071_476_5e-1_f64 as f32,
    -2.499_999_399_3e-1_f64 as f32,
    3.333_333_117_4e-1_f64 as f32,
];
/// ln 2 in two parts, the high one exact in few bits.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_40e-4_f64 as f32;

/// ln x for normal x > 0: Moshier's Cephes `logf`, with the multiply-adds that the compiler fused.
fn log(x: f32) -> f32 {
    let bits = x.to_bits();
    let mut e = ((bits >> 23) as i32 - 127) as f32 + 1.0;
    // The mantissa in [0.5, 1), then moved to [sqrt(0.5) − 1, sqrt(2) − 1).
    let mantissa = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    let mut x = mantissa - 1.0;
    if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        e -= 1.0;
        x += mantissa;
    }
    let z = x * x;
    let mut y = LOG_P[0];
    for p in &LOG_P[1..] {
        y = y.mul_add(x, *p);
    }
    y *= x;
    y = y.mul_add(z, e * LN_2_LOW);
    y = (-z).mul_add(0.5, y);
    e.mul_add(LN_2_HIGH, x + y)
}

/// −π/4 in three parts, the first two exact in few bits.
const MINUS_PI_4: [f32; 3] =
    [-201.0 / 256.0, -2.418_756_484_985_351_6e-4_f64 as f32, -3.774_894_977_445_941e-8_f64 as f32];
const SIN_P: [f32; 3] =
    [-1.951_529_589_1e-4_f64 as f32, 8.332_160_873_6e-3_f64 as f32, -1.666_665_461_1e-1_f64 as f32];
const COS_P: [f32; 3] = [
    2.443_315_711_809_948e-5_f64 as f32,
    -1.388_731_625_493_765e-3_f64 as f32,
    4.166_664_568_298_827e-2_f64 as f32,
];

/// (sin x, cos x) for 0 ≤ x < 8192: Moshier's Cephes `sinf`, with the multiply-adds that the compiler fused.
fn sin_cos(x: f32) -> (f32, f32) {
    const FOUR_OVER_PI: f32 = 1.273_239_544_735_16_f64 as f32;
    // The octant, made even; x is reduced to [−π/4, π/4] around it.
    let octant = ((x * FOUR_OVER_PI) as i32 + 1) & !1;
    let y = octant as f32;
    let mut x = x;
    for part in MINUS_PI_4 {
        x = y.mul_add(part, x);
    }
    let z = x * x;
    let c = z * COS_P[0].mul_add(z, COS_P[1]).mul_add(z, COS_P[2]);
    let c = 1.0 + c.mul_add(z, -(z * 0.5));
    let s = z * SIN_P[0].mul_add(z, SIN_P[1]).mul_add(z, SIN_P[2]);
    let s = s.mul_add(x, x);

    let (sin, cos) = if octant & 2 == 0 { (s, c) } else { (c, s) };
    let sin_sign = (octant as u32 & 4) << 29;
    let cos_sign = (!(octant - 2) as u32 & 4) << 29;
    (f32::from_bits(sin.to_bits() ^ sin_sign), f32::from_bits(cos.to_bits() ^ cos_sign))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The polynomials against double precision; their stated error is a few units in the last place.
    #[test]
    fn polynomials_approximate_the_functions() {
        for i in 0..1_u32 << 16 {
            let u = i as f32 / 65536.0;
            let exact = f64::from(1.0 - u).ln();
            assert!((f64::from(log(1.0 - u)) - exact).abs() <= 2e-7 * exact.abs().max(1e-3), "ln {u}");
            let x = std::f32::consts::TAU * u;
            let (sin, cos) = sin_cos(x);
            assert!((f64::from(sin) - f64::from(x).sin()).abs() < 2e-7, "sin {x}");
            assert!((f64::from(cos) - f64::from(x).cos()).abs() < 2e-7, "cos {x}");
        }
    }

    #[test]
    fn extremes_are_finite_and_zero_is_positive() {
        let most = f32::from_bits(1.0_f32.to_bits() - 1); // 1 − 2^−24, the largest uniform
        for (u1, u2) in [(0.0, 0.0), (0.0, most), (most, 0.0), (most, most)] {
            for (a, b) in [vector(u1, u2), scalar(u1, u2)] {
                assert!(
                    a.is_finite() && b.is_finite() && a.abs() < 6.0 && b.abs() < 6.0,
                    "{u1} {u2}: {a} {b}"
                );
            }
        }
        let (a, b) = vector(0.0, 0.3);
        assert_eq!((a.to_bits(), b.to_bits()), (0, 0));
    }
}
