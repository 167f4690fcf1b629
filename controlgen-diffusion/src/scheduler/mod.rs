//! diffusers' scheduler_config.json.

mod fields;
mod grid;

use std::path::Path;

use controlgen_core::guidance::Step;
use controlgen_core::{Error, NoiseLevel, Parameterisation, Result};

use crate::{
    Ddim, Ddpm, DiffusionSchedule, DpmSolver, DpmSolverType, Euler, EulerAncestral, FlowMatchEuler, Heun,
    Lcm, Pndm, Sampler, Spacing, Threshold, Thresholded, UniPc, UniPcType, Variance,
};
use fields::Fields;
use grid::{Ends, Flow, Grid, Sigmas, Times, Whole, sigma_spacing, spacing};

/// What a scheduler_config.json of diffusers 0.42 says: a schedule, the steps through it, what the model predicts, and
/// a sampler.
///
/// ```no_run
/// use controlgen_diffusion::Scheduler;
///
/// # fn main() -> controlgen_core::Result<()> {
/// let scheduler = Scheduler::open("stable-diffusion/scheduler/scheduler_config.json")?;
/// let (sampler, steps) = (scheduler.sampler(), scheduler.steps(25)?);
/// # Ok(())
/// # }
/// ```
///
/// It reads [`Scheduler::CLASSES`]. Tables are computed in f64 (diffusers: f32). Samples are of the models' own
/// coordinates, α² + σ² = 1; the classes that keep x/α ([`Scheduler::scales_samples`]) give the same images. Where
/// PNDM's timesteps are not equally far apart (linspace) each step goes to the next of them; diffusers goes elsewhere.
pub struct Scheduler {
    class: &'static str,
    table: Option<DiffusionSchedule>,
    grid: Grid,
    parameterisation: Parameterisation,
    learned_variance: bool,
    sampler: Box<dyn Sampler>,
    /// Of classes that keep samples as x/α: whether they begin with σ · noise.
    scales: Option<bool>,
    /// Of DDIM, whose η is no field of the file.
    ddim: Option<Ddim>,
}

impl Scheduler {
    /// The classes that can be read.
    pub const CLASSES: [&'static str; 11] = [
        "DDPMScheduler",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "PNDMScheduler",
        "LCMScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "UnCLIPScheduler",
    ];

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`]; those of [`Self::parse`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
        Self::parse(path, &text)
    }

    /// Reads the text of a file, which errors name. Fields that a class does not know are passed over, as diffusers
    /// does.
    ///
    /// # Errors
    /// [`Error::Format`] for no JSON object; [`Error::Unsupported`] for a class, or an option of it, that is not
    /// there; [`Error::Config`] for a field that makes no sense; those of the schedule.
    pub fn parse(file: impl AsRef<Path>, text: &str) -> Result<Self> {
        let fields = Fields::parse(file.as_ref(), text)?;
        let named = fields.text("_class_name", "")?;
        let Some(&class) = Self::CLASSES.iter().find(|class| **class == named) else {
            return Err(Error::unsupported(format!("scheduler `{named}`"), Self::CLASSES.join(", ")));
        };
        let scheduler = match class {
            "DDPMScheduler" => ddpm(class, &fields),
            "DDIMScheduler" => ddim(class, &fields),
            "PNDMScheduler" => pndm(class, &fields),
            "LCMScheduler" => lcm(class, &fields),
            "DPMSolverMultistepScheduler" => dpm_solver(class, &fields),
            "UniPCMultistepScheduler" => unipc(class, &fields),
            "FlowMatchEulerDiscreteScheduler" => flow_match(class, &fields),
            "UnCLIPScheduler" => unclip(class, &fields),
            _ => k_diffusion(class, &fields),
        }?;
        // Solvers that do not use the variance cut it off all the same.
        let learned_variance = fields.text("variance_type", "")?.starts_with("learned");
        Ok(Self { learned_variance, ..scheduler })
    }

    /// The name of diffusers' class.
    pub fn class(&self) -> &'static str {
        self.class
    }

    /// ᾱ of training; flows have none.
    pub fn schedule(&self) -> Option<&DiffusionSchedule> {
        self.table.as_ref()
    }

    /// What the model predicts: `prediction_type`.
    pub fn parameterisation(&self) -> Parameterisation {
        self.parameterisation
    }

    /// Another handle.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self {
            class: self.class,
            table: self.table.clone(),
            grid: self.grid.clone(),
            parameterisation: self.parameterisation,
            learned_variance: self.learned_variance,
            sampler: (*self.sampler).handle(),
            scales: self.scales,
            ddim: self.ddim,
        }
    }

    /// Whether the variance of a step is half of what the model puts out: `variance_type` `learned_range`.
    pub fn learned_variance(&self) -> bool {
        self.learned_variance
    }

    /// With this η of DDIM, which diffusers takes with each step; 0 unless it is said.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another class; [`Error::Value`] outside 0 ..= 1.
    pub fn with_eta(self, eta: f64) -> Result<Self> {
        let Some(ddim) = self.ddim else {
            return Err(Error::unsupported(format!("eta of {}", self.class), "eta of DDIMScheduler"));
        };
        let ddim = ddim.with_eta(eta)?;
        Ok(Self { sampler: Box::new(ddim), ddim: Some(ddim), ..self })
    }

    /// The sampler.
    pub fn sampler(&self) -> Box<dyn Sampler> {
        (*self.sampler).handle()
    }

    /// diffusers' `set_timesteps(n)`.
    ///
    /// # Errors
    /// [`Error::Value`] for n = 0 or more steps than there are timesteps.
    pub fn steps(&self, n: usize) -> Result<Vec<Step>> {
        self.grid.steps(n, self.table.as_ref())
    }

    /// The deviation of the noise that a run of these steps begins with: diffusers' `init_noise_sigma`, in the
    /// coordinates of the model. 1 but for the classes that begin with σ · noise, as if there were no clean part.
    pub fn initial_deviation(&self, steps: &[Step]) -> f64 {
        match (self.scales, steps.first()) {
            (Some(true), Some(step)) => step.level.sigma(),
            _ => 1.0,
        }
    }

    /// Whether diffusers keeps samples of this class as x/α and scales them for the model (`scale_model_input`).
    pub fn scales_samples(&self) -> bool {
        self.scales.is_some()
    }
}

/// The betas of all classes but those of flow.
fn table(fields: &Fields, start: f64, end: f64, schedule: &str) -> Result<DiffusionSchedule> {
    let n = fields.count("num_train_timesteps", 1000, 1_000_000)?;
    let (start, end) = (fields.number("beta_start", start)?, fields.number("beta_end", end)?);
    let table = match (fields.numbers("trained_betas")?, fields.text("beta_schedule", schedule)?) {
        (Some(betas), _) => DiffusionSchedule::from_betas(betas)?,
        (None, "linear") => DiffusionSchedule::linear(start, end, n)?,
        (None, "scaled_linear") => DiffusionSchedule::scaled_linear(start, end, n)?,
        (None, "squaredcos_cap_v2") => DiffusionSchedule::cosine(n)?,
        (None, "sigmoid") => DiffusionSchedule::sigmoid(start, end, n)?,
        (None, "exp") => DiffusionSchedule::exponential(n)?,
        (None, other) => {
            let known = "one of linear, scaled_linear, squaredcos_cap_v2, sigmoid, exp";
            return Err(fields.error("beta_schedule", known, other));
        }
    };
    if fields.bool("rescale_betas_zero_snr", false)? { table.zero_terminal_snr() } else { Ok(table) }
}

/// A table that may have been rescaled, with as much signal left at the end as diffusers leaves there for σ/α to be a
/// number.
fn finite_table(fields: &Fields, start: f64, schedule: &str, end: f64) -> Result<DiffusionSchedule> {
    let table = table(fields, start, end, schedule)?;
    let ends = table.alphas_cumprod().last() == Some(&0.0);
    Ok(if ends { table.ending_in(0.5f64.powi(24)) } else { table })
}

fn parameterisation(fields: &Fields, flows: bool) -> Result<Parameterisation> {
    use Parameterisation::{Epsilon, Sample, V, Velocity};
    let words =
        [("epsilon", Epsilon), ("sample", Sample), ("v_prediction", V), ("flow_prediction", Velocity)];
    fields.one_of("prediction_type", "epsilon", &words[..if flows { 4 } else { 3 }])
}

/// `thresholding`, else `clip_sample`, whose default is the class's.
fn threshold(fields: &Fields, clips: bool) -> Result<Option<Threshold>> {
    if fields.bool("thresholding", false)? {
        let quantile = fields.number("dynamic_thresholding_ratio", 0.995)?;
        return Threshold::dynamic(quantile, fields.number("sample_max_value", 1.0)?).map(Some);
    }
    if fields.bool("clip_sample", clips)? {
        return Threshold::clip(fields.number("clip_sample_range", 1.0)?).map(Some);
    }
    Ok(None)
}

fn within(sampler: impl Sampler + 'static, threshold: Option<Threshold>) -> Box<dyn Sampler> {
    match threshold {
        Some(threshold) => Box::new(Thresholded::new(sampler, threshold)),
        None => Box::new(sampler),
    }
}

fn ddpm(class: &'static str, fields: &Fields) -> Result<Scheduler> {
    let variances = [
        ("fixed_small", Variance::FixedSmall),
        ("fixed_small_log", Variance::FixedSmall),
        ("fixed_large", Variance::FixedLarge),
        ("learned_range", Variance::LearnedRange),
    ];
    let variance = fields.one_of("variance_type", "fixed_small", &variances)?;
    Ok(Scheduler {
        class,
        table: Some(table(fields, 1e-4, 0.02, "linear")?),
        grid: Grid::Whole { spacing: spacing(fields, "leading")?, last: NoiseLevel::CLEAN },
        parameterisation: parameterisation(fields, false)?,
        sampler: within(Ddpm::new(variance).with_noise_at_end(), threshold(fields, true)?),
        learned_variance: false,
        scales: None,
        ddim: None,
    })
}

/// DDPM as Karlo runs it: from the last timestep of training to the first, each step to the next.
fn unclip(class: &'static str, fields: &Fields) -> Result<Scheduler> {
    let betas = fields.text("beta_schedule", "squaredcos_cap_v2")?;
    if betas != "squaredcos_cap_v2" {
        return Err(fields.error("beta_schedule", "squaredcos_cap_v2", betas));
    }
    let variances = [("fixed_small_log", Variance::FixedSmall), ("learned_range", Variance::LearnedRange)];
    let variance = fields.one_of("variance_type", "fixed_small_log", &variances)?;
    let predicted = [("epsilon", Parameterisation::Epsilon), ("sample", Parameterisation::Sample)];
    Ok(Scheduler {
        class,
        table: Some(table(fields, 1e-4, 0.02, betas)?),
        grid: Grid::Whole { spacing: Spacing::Linspace, last: NoiseLevel::CLEAN },
        parameterisation: fields.one_of("prediction_type", "epsilon", &predicted)?,
        sampler: within(Ddpm::new(variance).with_noise_at_end(), threshold(fields, true)?),
        learned_variance: false,
        scales: None,
        ddim: None,
    })
}

fn ddim(class: &'static str, fields: &Fields) -> Result<Scheduler> {
    let table = table(fields, 1e-4, 0.02, "linear")?;
    let ends_clean = fields.bool("set_alpha_to_one", true)?;
    let last = if ends_clean { NoiseLevel::CLEAN } else { table.level(0.0)? };
    let ddim = Ddim::new(0.0)?.with_gaps();
    let ddim = threshold(fields, true)?.map_or(ddim, |threshold| ddim.with_threshold(threshold));
    Ok(Scheduler {
        class,
        table: Some(table),
        grid: Grid::Stride { spacing: spacing(fields, "leading")?, last },
        parameterisation: parameterisation(fields, false)?,
        sampler: Box::new(ddim),
        learned_variance: false,
        scales: None,
        ddim: Some(ddim),
    })
}

fn pndm(class: &'static str, fields: &Fields) -> Result<Scheduler> {
    if !fields.bool("skip_prk_steps", false)? {
        return Err(Error::unsupported("skip_prk_steps: false", "skip_prk_steps: true"));
    }
    let table = table(fields, 1e-4, 0.02, "linear")?;
    let ends_clean = fields.bool("set_alpha_to_one", false)?;
    let last = if ends_clean { NoiseLevel::CLEAN } else { table.level(0.0)? };
    Ok(Scheduler {
        class,
        table: Some(table),
        grid: Grid::Whole { spacing: spacing(fields, "leading")?, last },
        parameterisation: parameterisation(fields, false)?,
        sampler: Box::new(Pndm::default().with_means_of_v()),
        learned_variance: false,
        scales: None,
        ddim: None,
    })
}

fn lcm(class: &'static str, fields: &Fields) -> Result<Scheduler> {
    let table = table(fields, 0.00085, 0.012, "scaled_linear")?;
    let all = i64::try_from(table.alphas_cumprod().len()).unwrap_or(i64::MAX);
    let lcm = Lcm::new(fields.number("timestep_scaling", 10.0)?)?;
    Ok(Scheduler {
        class,
        grid: Grid::Distilled { original: fields.count("original_inference_steps", 50, all)? },
        table: Some(table),
        parameterisation: parameterisation(fields, false)?,
        sampler: within(lcm, threshold(fields, false)?),
        learned_variance: false,
        scales: None,
        ddim: None,
    })
}

fn ends(fields: &Fields, last: Ends) -> Result<Ends> {
    fields.one_of("final_sigmas_type", "zero", &[("zero", Ends::Clean), ("sigma_min", last)])
}

/// Euler, Euler ancestral, Heun.
fn k_diffusion(class: &'static str, fields: &Fields) -> Result<Scheduler> {
    let heun = class == "HeunDiscreteScheduler";
    let euler = class == "EulerDiscreteScheduler";
    let table = if heun {
        finite_table(fields, 0.00085, "linear", 0.012)?
    } else {
        finite_table(fields, 1e-4, "linear", 0.02)?
    };
    let parameterisation = parameterisation(fields, false)?;
    let spacing = spacing(fields, "linspace")?;
    let mut sigmas = Sigmas {
        spacing,
        solver: None,
        spaced: None,
        bounds: (None, None),
        whole: Whole::No,
        log_linear: false,
        continuous: false,
        ends: Ends::Clean,
    };
    if euler || heun {
        sigmas.spaced = sigma_spacing(fields)?;
    }
    if euler {
        sigmas.bounds = (fields.number_if("sigma_min")?, fields.number_if("sigma_max")?);
        let kinds = [("linear", false), ("log_linear", true)];
        sigmas.log_linear = fields.one_of("interpolation_type", "linear", &kinds)?;
        let types = [("discrete", false), ("continuous", true)];
        sigmas.continuous =
            fields.one_of("timestep_type", "discrete", &types)? && parameterisation == Parameterisation::V;
        sigmas.ends = ends(fields, Ends::First)?;
    }
    let sampler: Box<dyn Sampler> = match (euler, heun) {
        (true, _) => Box::new(Euler),
        (_, true) => within(Heun, threshold(fields, false)?),
        _ => Box::new(EulerAncestral::default()),
    };
    Ok(Scheduler {
        class,
        table: Some(table),
        grid: Grid::Sigmas(sigmas),
        parameterisation,
        sampler,
        learned_variance: false,
        scales: Some(!matches!(spacing, Spacing::Leading { .. })),
        ddim: None,
    })
}

/// A multistep solver's steps: of flow, or of sigmas.
fn solver_grid(fields: &Fields, table: &DiffusionSchedule, times: Times) -> Result<Grid> {
    let unipc = times == Times::UniPc;
    let spaced = sigma_spacing(fields)?;
    if fields.bool("use_flow_sigmas", false)? {
        fields.refuse("use_dynamic_shifting", "a fixed flow_shift")?;
        if spaced.is_some() || fields.text("final_sigmas_type", "zero")? != "zero" {
            let what = "use_flow_sigmas with another spacing or end";
            return Err(Error::unsupported(what, "use_flow_sigmas alone, to zero"));
        }
        let terminal = if unipc { fields.number_if("shift_terminal")? } else { None };
        let (training, shift) = (table.alphas_cumprod().len(), fields.number("flow_shift", 1.0)?);
        return Ok(Grid::Flow(Flow { training, shift, times, terminal, spaced: None }));
    }
    let (whole, least) = match spaced {
        None => (Whole::No, f64::NEG_INFINITY),
        Some(crate::SigmaSpacing::Exponential) => (Whole::Cut, f64::NEG_INFINITY),
        // DPM-Solver keeps the fractions of the cosine schedule, and then cuts them off.
        Some(_) if !unipc && fields.text("beta_schedule", "linear")? == "squaredcos_cap_v2" => {
            (Whole::Cut, f64::NEG_INFINITY)
        }
        Some(_) => (Whole::Round, f64::NEG_INFINITY),
    };
    let least = if unipc { least } else { fields.number("lambda_min_clipped", least)? };
    let of = table.sigmas().iter().filter(|sigma| -sigma.ln() >= least).count();
    let bounds =
        if unipc { (fields.number_if("sigma_min")?, fields.number_if("sigma_max")?) } else { (None, None) };
    let last = if unipc && spaced.is_some() { Ends::Same } else { Ends::First };
    Ok(Grid::Sigmas(Sigmas {
        spacing: spacing(fields, "linspace")?,
        solver: Some(of),
        spaced,
        bounds,
        whole,
        log_linear: false,
        continuous: false,
        ends: ends(fields, last)?,
    }))
}

fn solver_threshold(fields: &Fields) -> Result<Option<Threshold>> {
    if fields.bool("thresholding", false)? { threshold(fields, false) } else { Ok(None) }
}

fn dpm_solver(class: &'static str, fields: &Fields) -> Result<Scheduler> {
    let table = finite_table(fields, 1e-4, "linear", 0.02)?;
    let types = [
        ("midpoint", DpmSolverType::Midpoint),
        ("heun", DpmSolverType::Heun),
        // What diffusers makes of other classes' types.
        ("logrho", DpmSolverType::Midpoint),
        ("bh1", DpmSolverType::Midpoint),
        ("bh2", DpmSolverType::Midpoint),
    ];
    let solver = DpmSolver::new(fields.count("solver_order", 2, 3)?)?
        .with_type(fields.one_of("solver_type", "midpoint", &types)?)
        .with_lower_order_final(fields.bool("lower_order_final", true)?)
        .with_euler_at_final(fields.bool("euler_at_final", false)?);
    let algorithm = fields.text("algorithm_type", "dpmsolver++")?;
    let solver = match algorithm {
        "dpmsolver++" | "deis" => solver,
        "sde-dpmsolver++" => solver.stochastic()?,
        other => {
            let what = format!("algorithm_type `{other}`");
            return Err(Error::unsupported(what, "dpmsolver++, sde-dpmsolver++"));
        }
    };
    Ok(Scheduler {
        class,
        grid: solver_grid(fields, &table, Times::Dpm)?,
        table: Some(table),
        parameterisation: parameterisation(fields, true)?,
        sampler: within(solver, solver_threshold(fields)?),
        learned_variance: false,
        scales: None,
        ddim: None,
    })
}

fn unipc(class: &'static str, fields: &Fields) -> Result<Scheduler> {
    let table = finite_table(fields, 1e-4, "linear", 0.02)?;
    if !fields.bool("predict_x0", true)? {
        return Err(Error::unsupported("predict_x0: false", "predict_x0: true"));
    }
    fields.refuse("solver_p", "UniPC's own predictor")?;
    let types = [
        ("bh1", UniPcType::Bh1),
        ("bh2", UniPcType::Bh2),
        // What diffusers makes of other classes' types.
        ("midpoint", UniPcType::Bh2),
        ("heun", UniPcType::Bh2),
        ("logrho", UniPcType::Bh2),
    ];
    let disabled = fields.numbers("disable_corrector")?.unwrap_or_default();
    let unipc = UniPc::new(fields.count("solver_order", 2, 3)?)?
        .with_type(fields.one_of("solver_type", "bh2", &types)?)
        .with_lower_order_final(fields.bool("lower_order_final", true)?)
        .with_disabled_corrector(disabled.into_iter().map(|step| step as usize).collect());
    Ok(Scheduler {
        class,
        grid: solver_grid(fields, &table, Times::UniPc)?,
        table: Some(table),
        parameterisation: parameterisation(fields, true)?,
        sampler: within(unipc, solver_threshold(fields)?),
        learned_variance: false,
        scales: None,
        ddim: None,
    })
}

fn flow_match(class: &'static str, fields: &Fields) -> Result<Scheduler> {
    fields.refuse("use_dynamic_shifting", "a fixed shift")?;
    fields.refuse("invert_sigmas", "false")?;
    let flow = Flow {
        training: fields.count("num_train_timesteps", 1000, 1_000_000)?,
        shift: fields.number("shift", 1.0)?,
        times: Times::FlowMatch,
        terminal: fields.number_if("shift_terminal")?.filter(|&terminal| terminal != 0.0),
        spaced: sigma_spacing(fields)?,
    };
    let stochastic = fields.bool("stochastic_sampling", false)?;
    let euler = if stochastic { FlowMatchEuler::stochastic() } else { FlowMatchEuler::default() };
    Ok(Scheduler {
        class,
        table: None,
        grid: Grid::Flow(flow),
        parameterisation: Parameterisation::Velocity,
        sampler: Box::new(euler),
        learned_variance: false,
        scales: None,
        ddim: None,
    })
}
