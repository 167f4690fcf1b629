//! What may be sent to another thread, and what may be a `dyn`. It is checked by compiling.

use controlgen_core::energy::{Bound, Image, Noised, Objective, Text, Value};
use controlgen_core::guidance::{Guided, Guider, GuiderRun, Memory, Step};
use controlgen_core::testing::{Mixture, MixtureDenoiser, TableLm};
use controlgen_core::train::{Checkpoint, Ema, Gradients, Optimizer, Parameters, Trainer, TrainerConfig};
use controlgen_core::{
    Adapter, Autoencoder, BoxRows, Classifier, Condition, Control, Controls, Denoiser, DenoiserSpec, Encoder,
    Energy, Error, Guidance, ImageSampler, Lanes, LanguageModel, LmSpec, MaskedLm, NoiseLevel, Pass,
    Prediction, Prepared, SharedTensor, SiteMap, State, Taps, TokenControls, TokenControlsState,
};

fn send<T: Send + ?Sized>() {}
fn sync<T: Sync + ?Sized>() {}

#[test]
fn models_controls_and_energies_go_to_other_threads() {
    send::<Box<dyn LanguageModel>>();
    send::<Box<dyn MaskedLm>>();
    send::<Box<dyn Denoiser>>();
    send::<Box<dyn Encoder>>();
    send::<Box<dyn Autoencoder>>();
    send::<Box<dyn Classifier<Text>>>();
    send::<Box<dyn Classifier<Noised>>>();
    send::<Box<dyn ImageSampler>>();
    send::<TableLm>();
    send::<Mixture>();
    send::<MixtureDenoiser>();

    send::<Box<dyn Control>>();
    send::<Box<dyn Adapter>>();
    send::<Box<dyn Guidance>>();
    send::<Controls>();
    send::<TokenControls>();
    send::<Guider>();

    send::<Energy<Text>>();
    send::<Energy<Image>>();
    send::<Bound<Noised>>();
    send::<Objective<Image>>();
    send::<SharedTensor>();

    send::<Parameters>();
    send::<Gradients>();
    send::<Box<dyn Optimizer>>();
    send::<Ema>();
    send::<Trainer>();
    send::<Checkpoint>();
    sync::<TrainerConfig>();
}

#[test]
fn states_and_results_go_to_other_threads() {
    send::<State>();
    send::<TokenControlsState>();
    send::<BoxRows>();
    send::<Lanes>();
    send::<Taps>();
    send::<Prepared>();
    send::<Prediction>();
    send::<Condition>();
    send::<Guided>();
    send::<GuiderRun>();
    send::<Memory>();
    send::<Value>();
    send::<Text>();
}

#[test]
fn what_holds_no_tensor_is_shared_by_threads() {
    send::<Error>();
    sync::<Error>();
    sync::<SiteMap>();
    sync::<LmSpec>();
    sync::<DenoiserSpec>();
    sync::<NoiseLevel>();
    sync::<Step>();
}

#[test]
fn handles_of_one_model_run_on_many_threads() {
    let model = TableLm::random(5, 1).map_err(|error| error.to_string());
    let Ok(model) = model else { panic!("no model") };
    let expected = run(&model);
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let handle = model.handle();
            std::thread::spawn(move || run(&*handle))
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().ok(), Some(expected.clone()));
    }
}

fn run(model: &dyn LanguageModel) -> Option<Vec<f32>> {
    use controlgen_core::{LmInput, Source};
    let ids = tch::Tensor::from_slice(&[0i64, 2, 3, 1]).view([1, 4]);
    let mut state = model.start(Source::Rows(1), &Pass::default()).ok()?;
    let logits = model.forward(LmInput::ids(&ids), &mut state, &Pass::default()).ok()?.logits;
    Vec::try_from(logits.view(-1)).ok()
}
