//! Energies: their algebra, gradients against finite differences, constraints, and every refusal.
#![allow(clippy::unwrap_used)]

use controlgen_core::energy::{Energy, EnergyFn, Image, Objective, Point, Text, gradient, langevin, rerank};
use controlgen_core::noise::Noise;
use controlgen_core::testing::{TableLm, contract, ks_test};
use controlgen_core::{EnableGrad, Error, LanguageModel, LmInput, Pass, Result, SharedTensor, Source};
use tch::{Kind, Tensor, kind::DOUBLE_CPU};

fn image(rows: i64) -> Image {
    let n = rows * 8;
    Image((Tensor::arange(n, DOUBLE_CPU) * 1.7 + 0.3).sin().view([rows, 2, 2, 2]))
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

/// Σ x² over a row.
fn square() -> Energy<Image> {
    Energy::from_fn(|x: &Image| Ok(x.0.square().sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double)))
}

/// Σ sin(x w) over a row, with w captured.
fn waves() -> Energy<Image> {
    let w = SharedTensor::from(Tensor::from_slice(&[1.5, -2.0]).view([2, 1, 1]));
    Energy::from_fn(move |x: &Image| {
        Ok((&x.0 * &*w).sin().sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double))
    })
}

/// The gradient by central differences, one number at a time.
fn differences<X: Point>(energy: &Energy<X>, x: &X) -> Vec<f64> {
    let h = 1e-6;
    let (free, _guard) = (x.free().unwrap(), tch::no_grad_guard());
    let total = |at: Tensor| energy.energy(&x.rebuilt(at)).unwrap().sum(Kind::Double).double_value(&[]);
    let base = numbers(free);
    (0..base.len())
        .map(|i| {
            let moved = |by: f64| {
                let mut all = base.clone();
                all[i] += by;
                total(Tensor::from_slice(&all).view(free.size().as_slice()))
            };
            (moved(h) - moved(-h)) / (2.0 * h)
        })
        .collect()
}

fn close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{a} instead of {b}");
    }
}

#[test]
fn the_algebra_computes() {
    let x = image(3);
    let (a, b) = (numbers(&square().energy(&x).unwrap()), numbers(&waves().energy(&x).unwrap()));
    let combined = 2.0 * square() + waves() * 0.5 - square();
    let negated = -combined.clone();
    let expected: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a + 0.5 * b).collect();
    close(&numbers(&combined.energy(&x).unwrap()), &expected, 1e-12);
    close(&numbers(&negated.energy(&x).unwrap()), &expected.iter().map(|e| -e).collect::<Vec<_>>(), 1e-12);
}

#[test]
fn they_keep_the_contract() {
    for energy in [square(), waves(), 2.0 * square() - waves()] {
        contract::energy(&energy, &image(3)).unwrap();
    }
    let objective = Energy::new(square() + waves().at_most(1e9));
    contract::energy(&objective, &image(2)).unwrap();
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let x = image(3);
    for energy in [square(), waves(), 2.0 * square() - waves()] {
        let _inference = tch::no_grad_guard();
        let (value, found) = gradient(&energy, &x).unwrap();
        close(&numbers(&value), &numbers(&energy.energy(&x).unwrap()), 1e-12);
        close(&numbers(&found), &differences(&energy, &x), 1e-7);
        assert!(!value.requires_grad() && !found.requires_grad() && !x.0.requires_grad());
    }
}

/// −log p(x | bos) under a TableLm; soft tokens by expected embeddings in, cross-entropy out.
struct Nll(Box<dyn LanguageModel>);
impl Clone for Nll {
    fn clone(&self) -> Self {
        Self((*self.0).handle())
    }
}
impl EnergyFn<Text> for Nll {
    fn energy(&self, x: &Text) -> Result<Tensor> {
        let table = self.0.embeddings();
        let probs = match x {
            Text::Hard { ids, .. } => ids.f_one_hot(table.size()[0])?.f_to_kind(table.f_kind()?)?,
            Text::Soft { probs, .. } => probs.f_to_kind(table.f_kind()?)?,
        };
        let (b, t, _) = probs.size3()?;
        let bos = table.f_get(0)?.f_expand([b, 1, -1], false)?;
        let input = Tensor::f_cat(&[&bos, &probs.f_matmul(table)?.f_narrow(1, 0, t - 1)?], 1)?;
        let mut state = self.0.start(Source::Rows(b), &Pass::default())?;
        let logits = self.0.forward(LmInput::embeds(&input), &mut state, &Pass::default())?.logits;
        let each = logits.f_log_softmax(-1, None)?.f_mul(&probs)?;
        Ok(each.f_sum_dim_intlist(&[1i64, 2][..], false, None::<Kind>)?.f_neg()?)
    }
}

#[test]
fn a_language_model_is_an_energy_of_soft_tokens() {
    use controlgen_core::Placement;
    use controlgen_core::testing::TableLmConfig;
    let placement = Placement::CPU.with_kind(Kind::Double);
    let lm =
        TableLm::new(&TableLmConfig { vocab: 4, placement, seed: 3, ..TableLmConfig::default() }).unwrap();
    let nll = Energy::new(Nll(lm.handle()));
    let sequences = [[2i64, 3, 3], [1, 0, 2]];
    let hard = Text::hard(Tensor::from_slice2(&sequences));
    let truth: Vec<f64> = sequences.iter().map(|s| -lm.log_prob(&[0], s).unwrap()).collect();
    close(&numbers(&nll.energy(&hard).unwrap()), &truth, 1e-12);
    // Sharp soft tokens are tokens, and blunt ones have a gradient.
    let one_hot = Tensor::from_slice2(&sequences).one_hot(4).to_kind(Kind::Double);
    close(&numbers(&nll.energy(&Text::soft(one_hot)).unwrap()), &truth, 1e-12);
    let soft = Text::soft((Tensor::arange(24, DOUBLE_CPU) * 0.7).sin().view([2, 3, 4]).softmax(-1, None));
    contract::energy(&nll, &soft).unwrap();
    contract::energy(&nll, &hard).unwrap();
    let _inference = tch::no_grad_guard();
    let found = gradient(&nll, &soft).unwrap().1;
    close(&numbers(&found), &differences(&nll, &soft), 1e-6);
    assert!(matches!(gradient(&nll, &hard), Err(Error::NotDifferentiable { .. })));
    // The lower energy is the likelier sequence.
    let expected = if truth[0] <= truth[1] { [0, 1] } else { [1, 0] };
    assert_eq!(rerank(&nll, &hard).unwrap(), expected);
}

/// E = x²/(2 s²): a chain of steps η has the variance s² / (1 − η/(2 s²)), exactly.
#[test]
fn langevin_has_the_variance_of_its_step_size() {
    const ALPHA: f64 = 0.001;
    let (s2, rows) = (0.7f64, 500);
    let energy = 0.5 / s2 * square();
    for eta in [0.1, 0.6] {
        let mut x = Image(Tensor::zeros([rows, 2, 2, 2], DOUBLE_CPU));
        let mut noise = Noise::seeded(11).streams(rows as usize);
        // The start is forgotten by |1 − η/s²| a step.
        for _ in 0..150 {
            x = langevin(&energy, &x, eta, &mut noise).unwrap().1;
        }
        let samples = numbers(&x.0);
        let normal = |variance: f64| {
            move |x: f64| {
                let erf = Tensor::from(x / (2.0 * variance).sqrt()).erf().double_value(&[]);
                0.5 * (1.0 + erf)
            }
        };
        let p = ks_test(&samples, normal(s2 / (1.0 - eta / (2.0 * s2)))).unwrap();
        assert!(p > ALPHA, "step {eta}: p = {p}");
        if eta > 0.5 {
            let p = ks_test(&samples, normal(s2)).unwrap();
            assert!(p < ALPHA, "the target's own variance should be refused: p = {p}");
        }
    }
    // A row's chain is its own.
    let walk = |rows: i64, of: std::ops::Range<usize>| {
        let mut x = Image(image(3).0.narrow(0, of.start as i64, rows));
        let mut noise = Noise::seeded(2).streams(3)[of].to_vec();
        for _ in 0..5 {
            x = langevin(&energy, &x, 0.1, &mut noise).unwrap().1;
        }
        x.0
    };
    assert!(walk(3, 0..3).narrow(0, 1, 1).equal(&walk(1, 1..2)));
    let x = image(1);
    let mut noise = Noise::seeded(0).streams(1);
    let value = langevin(&energy, &x, 0.1, &mut noise).unwrap().0;
    close(&numbers(&value), &numbers(&energy.energy(&x).unwrap()), 1e-12);
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(matches!(langevin(&energy, &x, bad, &mut noise), Err(Error::Value { .. })));
    }
    let two = &mut Noise::seeded(0).streams(2);
    assert!(matches!(langevin(&energy, &x, 0.1, two), Err(Error::Shape { .. })));
}

#[test]
fn reranking_is_stable_and_puts_never_last() {
    let values = |v: &[f64]| {
        let v = SharedTensor::from(Tensor::from_slice(v));
        Energy::from_fn(move |_: &Image| Ok(v.shallow_clone()))
    };
    let x = image(5);
    let order = rerank(&values(&[f64::INFINITY, 0.0, -1.0, -0.0, 0.0]), &x).unwrap();
    assert_eq!(order, [2, 1, 3, 4, 0]);
    let Err(Error::NotFinite { at, found, .. }) = rerank(&values(&[0.0, f64::NAN, 1.0, f64::NAN, 0.0]), &x)
    else {
        panic!("NaN was ranked")
    };
    assert_eq!((at.as_str(), found.as_str()), ("rows 1, 3", "NaN"));
}

#[test]
fn constraints_are_read_hard_or_with_multipliers() {
    let x = image(3);
    let (e, f) = (numbers(&square().energy(&x).unwrap()), numbers(&waves().energy(&x).unwrap()));
    let epsilon = (f[0] + f[1]) / 2.0;
    let objective = square() + waves().at_most(epsilon) + square().at_most(1e9);
    let value = objective.evaluate(&x).unwrap();
    assert_eq!(value.slack.size(), [3, 2]);
    let hard = numbers(&value.hard().unwrap());
    for row in 0..3 {
        let expected = if f[row] <= epsilon { e[row] } else { f64::INFINITY };
        assert_eq!(hard[row], expected);
    }
    assert!(hard.contains(&f64::INFINITY) && hard.iter().any(|e| e.is_finite()), "the case tells nothing");
    assert_eq!(numbers(&objective.energy(&x).unwrap()), hard, "as an energy an objective is hard");
    let lambda = Tensor::from_slice2(&[[0.0, 0.0], [2.0, 0.0], [0.5, 0.0]]);
    let expected: Vec<f64> =
        [0.0, 2.0, 0.5].iter().enumerate().map(|(i, lambda)| e[i] - lambda * (epsilon - f[i])).collect();
    close(&numbers(&value.lagrangian(&lambda).unwrap()), &expected, 1e-12);
    assert!(matches!(value.lagrangian(&lambda.narrow(1, 0, 1)), Err(Error::Shape { .. })));
    assert!(matches!(value.lagrangian(&-lambda), Err(Error::Value { .. })));
    // Without constraints it is the energy.
    let free = Objective::from(square()).evaluate(&x).unwrap();
    assert_eq!(numbers(&free.hard().unwrap()), e);
    assert_eq!(free.slack.size(), [3, 0]);
    // A slack that is no number keeps nothing.
    let nan = Energy::from_fn(|x: &Image| Ok(Tensor::full([x.0.size()[0]], f64::NAN, DOUBLE_CPU)));
    let value = (square() + nan.at_most(1.0)).evaluate(&x).unwrap();
    assert_eq!(numbers(&value.hard().unwrap()), [f64::INFINITY; 3]);
    assert!(matches!((square() + square().at_most(f64::NAN)).evaluate(&x), Err(Error::Value { .. })));
}

#[test]
fn wrong_energies_are_refused() {
    let x = image(2);
    let refused = |f: fn(&Tensor) -> Tensor| {
        let energy = Energy::from_fn(move |x: &Image| Ok(f(&x.0)));
        gradient(&energy, &x).map(drop).unwrap_err()
    };
    // Shapes: a column, a scalar, or too few rows would broadcast.
    let shapes: [fn(&Tensor) -> Tensor; 3] = [
        |x| x.sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double).unsqueeze(1),
        |x| x.sum(Kind::Double),
        |x| x.sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double).narrow(0, 0, 1),
    ];
    for f in shapes {
        assert!(matches!(refused(f), Error::Shape { .. }));
        let energy = Energy::from_fn(move |x: &Image| Ok(f(&x.0)));
        assert!(matches!((square() + energy.clone()).energy(&x), Err(Error::Shape { .. })));
        assert!(matches!((square() + energy.at_most(1.0)).evaluate(&x), Err(Error::Shape { .. })));
    }
    // What does not depend on x: a constant, a detached value, a graph that does not reach x, no gradients at all.
    let independent: [fn(&Tensor) -> Tensor; 4] = [
        |_| Tensor::zeros([2], DOUBLE_CPU),
        |x| x.detach().flatten(1, -1).select(1, 0),
        |_| Tensor::ones([2], DOUBLE_CPU).set_requires_grad(true) * 2.0,
        |x| {
            let _guard = tch::no_grad_guard();
            x.flatten(1, -1).select(1, 0)
        },
    ];
    for f in independent {
        assert!(matches!(refused(f), Error::NotDifferentiable { .. }));
    }
    // Numbers: an energy that is NaN or infinite, and a gradient that is.
    let infinite = refused(|x| x.flatten(1, -1).select(1, 0) * f64::INFINITY);
    assert_eq!(infinite.to_string(), "energy: infinity at rows 0, 1");
    // √ of the squares of a row has no gradient where they are all 0.
    let rooted = refused(|x| {
        let x = x * Tensor::from_slice(&[1.0, 0.0]).view([2, 1, 1, 1]);
        x.square().sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double).sqrt()
    });
    assert_eq!(
        rooted.to_string(),
        "gradient of the energy: NaN, norm NaN (1.0000e0 over its finite numbers) at row 1"
    );
    // Integers have no gradient.
    let whole = Image(Tensor::ones([2, 1, 1, 1], (Kind::Int64, tch::Device::Cpu)));
    assert!(matches!(gradient(&square(), &whole), Err(Error::Kind { .. })));
    assert!(matches!((f64::NAN * square()).energy(&x), Err(Error::Value { .. })));
}

#[test]
fn an_energy_that_panics_leaves_gradients_as_they_were() {
    let _inference = tch::no_grad_guard();
    let recording = || (Tensor::ones([1], DOUBLE_CPU).set_requires_grad(true) * 2.0).requires_grad();
    let panicking = Energy::from_fn(|_: &Image| panic!("a bug of the user's"));
    let result =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(gradient(&panicking, &image(1)))));
    assert!(result.is_err() && !recording());
    let failing = Energy::from_fn(|_: &Image| Err(Error::ForeignSites));
    assert!(matches!(gradient(&failing, &image(1)), Err(Error::ForeignSites)));
    assert!(!recording());
    let _on = EnableGrad::new();
    assert!(recording());
}

#[test]
fn energies_cross_threads() {
    let energy = 2.0 * square() + waves();
    let expected = numbers(&gradient(&energy, &image(2)).unwrap().1);
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let energy = energy.clone();
            std::thread::spawn(move || numbers(&gradient(&energy, &image(2)).unwrap().1))
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), expected);
    }
}
