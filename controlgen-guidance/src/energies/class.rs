//! A class as an energy.

use controlgen_core::{Classifier, Energy, EnergyFn, Error, Result};
use tch::{Kind, Tensor};

/// E(x) = −ln p(y | x) of a classifier: over [`Noised`](controlgen_core::energy::Noised) samples for classifier
/// guidance, over clean [`Image`](controlgen_core::energy::Image)s for universal guidance. `classes` is y, one for all
/// rows or one a row.
///
/// # Errors
/// [`Error::Value`] for no classes, or one that the classifier does not have. The energy's own: [`Error::Shape`] for
/// logits that are not `[B, K]`, [`Error::Value`] for another number of rows than of classes; the classifier's.
pub fn class_energy<X: ?Sized + 'static>(
    classifier: Box<dyn Classifier<X>>,
    classes: &[i64],
) -> Result<Energy<X>> {
    let known = i64::try_from(classifier.classes().len()).unwrap_or(i64::MAX);
    if classes.is_empty() {
        return Err(Error::value("classes", "one, or one a row", 0));
    }
    if let Some(class) = classes.iter().find(|&&class| class < 0 || class >= known) {
        return Err(Error::value("class", format!("0 .. {known}"), class));
    }
    Ok(Energy::new(ClassEnergy { classifier, classes: classes.to_vec(), known }))
}

struct ClassEnergy<X: ?Sized> {
    classifier: Box<dyn Classifier<X>>,
    classes: Vec<i64>,
    known: i64,
}

impl<X: ?Sized> Clone for ClassEnergy<X> {
    fn clone(&self) -> Self {
        Self { classifier: (*self.classifier).handle(), classes: self.classes.clone(), known: self.known }
    }
}

impl<X: ?Sized> EnergyFn<X> for ClassEnergy<X> {
    fn energy(&self, x: &X) -> Result<Tensor> {
        let logits = self.classifier.logits(x)?; // (B, K)
        let &[rows, known] = logits.size().as_slice() else {
            return Err(Error::shape(
                "logits of a classifier",
                format!("[B, {}]", self.known),
                &logits.size(),
            ));
        };
        if known != self.known {
            return Err(Error::shape(
                "logits of a classifier",
                format!("[B, {}]", self.known),
                &logits.size(),
            ));
        }
        let log_p = logits.f_log_softmax(1, None::<Kind>)?;
        let log_p = match self.classes.as_slice() {
            [class] => log_p.f_select(1, *class)?,
            classes if i64::try_from(classes.len()) == Ok(rows) => {
                let index = Tensor::f_from_slice(classes)?.f_to_device(log_p.device())?.f_unsqueeze(1)?;
                log_p.f_gather(1, &index, false)?.f_squeeze_dim(1)?
            }
            classes => return Err(Error::value("classes", format!("1 or {rows}, one a row"), classes.len())),
        };
        Ok(log_p.f_neg()?)
    }
}
