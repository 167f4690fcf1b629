//! Features of conditions, as denoisers take them.

use controlgen_core::{Condition, Error, Placement, Result};
use tch::{Kind, Tensor};

/// Refuses features that are none of `known`.
///
/// # Errors
/// [`Error::Unsupported`], naming those that are.
pub fn only(conditions: &[Condition], known: &[&str]) -> Result<()> {
    for condition in conditions {
        if let Condition::Features(features) = condition
            && let Some((odd, _)) = features.iter().find(|feature| !known.contains(&feature.0.as_str()))
        {
            let known = if known.is_empty() { "no features".to_owned() } else { known.join(", ") };
            return Err(Error::unsupported(format!("the feature `{odd}`"), known));
        }
    }
    Ok(())
}

/// Whether any condition has this feature.
pub fn any(conditions: &[Condition], name: &str) -> bool {
    conditions.iter().any(|condition| condition.feature(name).is_ok())
}

/// The feature of this name of each condition, one row each, as the model's numbers: `[B, ..]`. A size of −1 may be any.
///
/// # Errors
/// [`Error::Unsupported`] where a condition lacks it; [`Error::Shape`] where one is of another shape, or they differ.
pub fn stacked(conditions: &[Condition], name: &str, shape: &[i64], placement: Placement) -> Result<Tensor> {
    let mut rows = Vec::with_capacity(conditions.len());
    let mut first: Option<Vec<i64>> = None;
    for condition in conditions {
        let found = condition.feature(name)?;
        let size = found.size();
        let fits = size.len() == shape.len() && size.iter().zip(shape).all(|(n, m)| n == m || *m == -1);
        if !fits {
            let any: Vec<String> =
                shape.iter().map(|n| if *n < 0 { "n".into() } else { n.to_string() }).collect();
            return Err(Error::shape(format!("`{name}`"), format!("[{}]", any.join(", ")), &size));
        }
        if let Some(first) = first.as_ref().filter(|first| **first != size) {
            return Err(Error::shape(format!("`{name}` of a batch"), format!("{first:?}, as before"), &size));
        }
        first = Some(size);
        rows.push(found.f_to_device(placement.device)?.f_to_kind(placement.kind)?);
    }
    Ok(Tensor::f_stack(&rows, 0)?)
}

/// The mask `[T]` of each condition, boolean `[B, T]`: not 0 is to be seen, and all is where there is none.
///
/// # Errors
/// [`Error::Shape`] for a mask of another length; [`Error::Value`] for one that leaves nothing to be seen.
pub fn masks(conditions: &[Condition], name: &str, len: i64, placement: Placement) -> Result<Tensor> {
    let row = |condition: &Condition| -> Result<Tensor> {
        let Ok(mask) = condition.feature(name) else {
            return Ok(Tensor::f_ones([len], (Kind::Bool, placement.device))?);
        };
        if mask.size() != [len] {
            return Err(Error::shape(format!("`{name}`"), format!("[{len}]"), &mask.size()));
        }
        let keep = mask.f_to_device(placement.device)?.f_ne(0)?;
        if keep.f_any()?.f_int64_value(&[])? == 0 {
            return Err(Error::value(format!("`{name}`"), "one that leaves something to be seen", "all 0"));
        }
        Ok(keep)
    };
    Ok(Tensor::f_stack(&conditions.iter().map(row).collect::<Result<Vec<_>>>()?, 0)?)
}

/// The class of each condition, int64 `[B]`: of [`Condition::Class`], or `class_labels` `[]`.
///
/// # Errors
/// [`Error::Unsupported`] for a condition without one; [`Error::Value`] for one that is no class of the model's.
pub fn classes(conditions: &[Condition], classes: i64, placement: Placement) -> Result<Tensor> {
    let class = |condition: &Condition| -> Result<i64> {
        let class = match condition {
            Condition::Class(class) => *class,
            Condition::Features(_) => {
                let found = condition.feature("class_labels")?;
                if !found.size().is_empty() {
                    return Err(Error::shape("`class_labels`", "[]", &found.size()));
                }
                found.f_to_kind(Kind::Int64)?.f_int64_value(&[])?
            }
            _ => return Err(Error::unsupported("no class", format!("classes 0 .. {classes}"))),
        };
        match (0..classes).contains(&class) {
            true => Ok(class),
            false => Err(Error::value("class", format!("0 .. {classes}"), class)),
        }
    };
    let found = conditions.iter().map(class).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_from_slice(&found)?.f_to_device(placement.device)?)
}
