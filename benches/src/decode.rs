//! One step of decoding, again and again from the same place, under controls inside the model.

use controlgen_core::{
    Binding, Control, Controls, LanguageModel, LmInput, Pass, Result, SiteKind, SiteMap, Source, State,
};
use tch::{Kind, Tensor};

/// A state after a prompt, from which a step is taken and taken back.
pub struct Decoding<'a> {
    model: &'a dyn LanguageModel,
    state: State,
    len: i64,
    next: Tensor,
}

impl<'a> Decoding<'a> {
    /// Reads a prompt of `len` tokens, one row.
    ///
    /// # Errors
    /// The model's.
    pub fn start(model: &'a dyn LanguageModel, len: i64) -> Result<Self> {
        let _no_gradients = tch::no_grad_guard();
        let spec = model.spec();
        let ids = Tensor::f_arange(len + 1, (Kind::Int64, spec.placement.device))?;
        let ids = ids.f_mul_scalar(7919)?.f_remainder(spec.vocab)?.f_unsqueeze(0)?;
        let mut state = model.start(Source::Rows(1), &Pass::default())?;
        state.reserve(len + 1)?;
        model.forward(LmInput::ids(&ids.f_narrow(1, 0, len)?).last(), &mut state, &Pass::default())?;
        Ok(Self { model, state, len, next: ids.f_narrow(1, len, 1)? })
    }

    /// A step, waited for; the state is then as before.
    ///
    /// # Errors
    /// The model's and the controls'.
    pub fn step(&mut self, controls: Option<&Controls>) -> Result<f64> {
        let _no_gradients = tch::no_grad_guard();
        let pass = Pass { controls, ..Pass::default() };
        let output = self.model.forward(LmInput::ids(&self.next).last(), &mut self.state, &pass)?;
        self.state.truncate(self.len)?;
        Ok(output.logits.f_double_value(&[0, 0, 0])?)
    }
}

/// A control that is called at every site, and does nothing.
struct Identity;

impl Control for Identity {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self)
    }

    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.iter().for_each(|(site, _)| to.at(site, 0));
        sites.of_kind(SiteKind::Linear).for_each(|(site, _)| to.at_input(site, 0));
        Ok(())
    }
}

/// A stack of one control that is called at every site of the model, before products too, and does nothing.
///
/// # Errors
/// None is known.
pub fn identity(model: &dyn LanguageModel) -> Result<Controls> {
    Controls::bind(model.sites(), vec![Box::new(Identity)])
}
