//! Classifiers: x to the probabilities of its classes.

use tch::Tensor;

use crate::Result;

/// p(y | x) over points of type X: [`Text`](crate::energy::Text), [`Image`](crate::energy::Image), or, for classifier
/// guidance, [`Noised`](crate::energy::Noised), which knows how much noise there is. Differentiable in X wherever it
/// can be.
pub trait Classifier<X: ?Sized>: Send {
    /// Another handle over the same weights.
    fn handle(&self) -> Box<dyn Classifier<X>>;

    /// The names of the classes, K of them, in order.
    fn classes(&self) -> &[String];

    /// Unnormalised log-probabilities, `[B, K]`: log p(y | x) is their log-softmax.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for an x that it does not read; the classifier's own.
    fn logits(&self, x: &X) -> Result<Tensor>;
}
