//! Conditions as a denoiser has prepared them.

use tch::Tensor;

use crate::{Error, Pass, Result, Rows, SiteMap};

/// What a denoiser computed of its conditions, one row each: tensors whose first dimension is the row, in an order
/// that only the denoiser knows.
///
/// It remembers the model and the controls under which it was computed. A control at a site that only works on
/// conditions (`to_k`, `to_v`) would otherwise be without effect, silently, where the conditions were prepared under
/// another stack.
pub struct Prepared {
    sites: u64,
    controls: Option<u64>,
    rows: i64,
    tensors: Vec<Tensor>,
}

impl Prepared {
    /// Tensors `[rows, ..]`, computed under `pass` by the model of these sites.
    ///
    /// # Errors
    /// [`Error::Shape`] for a tensor of another number of rows; [`Error::ForeignSites`].
    pub fn new(sites: &SiteMap, pass: &Pass<'_>, rows: i64, tensors: Vec<Tensor>) -> Result<Self> {
        pass.check_sites(sites)?;
        if let Some(odd) = tensors.iter().find(|t| t.size().first() != Some(&rows)) {
            return Err(Error::shape("prepared conditions", format!("[{rows}, ..]"), &odd.size()));
        }
        let controls = pass.controls.filter(|controls| !controls.is_empty()).map(crate::Controls::id);
        Ok(Self { sites: sites.id(), controls, rows, tensors })
    }

    /// Refuses what another model prepared, or this one under other controls; a denoiser calls it once a pass.
    ///
    /// # Errors
    /// [`Error::ForeignState`].
    pub fn check(&self, sites: &SiteMap, pass: &Pass<'_>) -> Result<()> {
        if self.sites != sites.id() {
            return Err(Error::ForeignState { expected: "conditions that this model prepared" });
        }
        let controls = pass.controls.filter(|controls| !controls.is_empty()).map(crate::Controls::id);
        if self.controls != controls {
            return Err(Error::ForeignState {
                expected: "conditions prepared under the controls of this pass",
            });
        }
        Ok(())
    }

    /// How many rows there are.
    pub fn rows(&self) -> i64 {
        self.rows
    }

    /// The tensors, in the order in which the denoiser gave them.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Rows by index: row `i` is what row `index[i]` is here. One prompt for several samples, one sample under
    /// several prompts.
    ///
    /// # Errors
    /// [`Error::Value`] for an index that is no row.
    pub fn select(&self, index: &[i64]) -> Result<Self> {
        let tensors = self.tensors.iter().map(Tensor::shallow_clone).collect();
        let mut selected = Self { tensors, ..*self };
        selected.reorder(index)?;
        Ok(selected)
    }
}

impl Rows for Prepared {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        if let Some(row) = rows.iter().find(|&&row| row < 0 || row >= self.rows) {
            return Err(Error::value("row", format!("0 .. {}", self.rows), row));
        }
        if (0..self.rows).eq(rows.iter().copied()) {
            return Ok(());
        }
        let pick = |t: &Tensor| -> Result<Tensor> {
            let mut t = t.shallow_clone();
            t.reorder(rows)?;
            Ok(t)
        };
        self.tensors = self.tensors.iter().map(pick).collect::<Result<_>>()?;
        self.rows = i64::try_from(rows.len()).unwrap_or(i64::MAX);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Binding, Control, Controls, Dims};
    use tch::kind::DOUBLE_CPU;

    struct Nothing;
    impl Control for Nothing {
        fn handle(&self) -> Box<dyn Control> {
            Box::new(Self)
        }
        fn bind(&self, _sites: &SiteMap, _to: &mut Binding<'_>) -> Result<()> {
            Ok(())
        }
    }

    fn sites() -> SiteMap {
        let mut sites = SiteMap::new();
        sites.add("to_k", Dims::Linear { inputs: 2, outputs: 2 });
        sites
    }

    fn rows() -> Tensor {
        Tensor::arange(6, DOUBLE_CPU).view([3, 2])
    }

    #[test]
    fn it_remembers_model_and_controls() {
        let (own, other) = (sites(), sites());
        let stack = |sites| Controls::bind(sites, vec![Box::new(Nothing)]).unwrap();
        let (a, b, empty) = (stack(&own), stack(&own), Controls::bind(&own, vec![]).unwrap());
        let handle = a.handle();
        let under = |controls| Pass::with_controls(controls);
        let prepared = Prepared::new(&own, &under(&a), 3, vec![rows()]).unwrap();
        assert!(prepared.check(&own, &under(&a)).is_ok());
        assert!(prepared.check(&own, &under(&handle)).is_ok(), "a handle is the same stack");
        for pass in [under(&b), Pass::default(), under(&empty)] {
            assert!(matches!(prepared.check(&own, &pass), Err(Error::ForeignState { .. })));
        }
        assert!(matches!(prepared.check(&other, &under(&a)), Err(Error::ForeignState { .. })));
        // No controls and none in a stack are the same.
        let plain = Prepared::new(&own, &Pass::default(), 3, vec![rows()]).unwrap();
        assert!(plain.check(&own, &under(&empty)).is_ok());
        assert!(matches!(plain.check(&own, &under(&a)), Err(Error::ForeignState { .. })));
        let foreign = Prepared::new(&other, &under(&a), 3, vec![rows()]);
        assert!(matches!(foreign, Err(Error::ForeignSites)));
    }

    #[test]
    fn rows_go_by_index() {
        let own = sites();
        let prepared = Prepared::new(&own, &Pass::default(), 3, vec![rows(), rows() * 2.0]).unwrap();
        let picked = prepared.select(&[2, 2, 0, 1]).unwrap();
        assert_eq!(picked.rows(), 4);
        let first = Vec::<f64>::try_from(picked.tensors()[1].select(1, 0)).unwrap();
        assert_eq!(first, [8.0, 8.0, 0.0, 4.0]);
        assert!(picked.check(&own, &Pass::default()).is_ok());
        for bad in [3, -1] {
            assert!(matches!(prepared.select(&[bad]), Err(Error::Value { .. })));
        }
        let uneven = Prepared::new(&own, &Pass::default(), 2, vec![rows()]);
        assert!(matches!(uneven, Err(Error::Shape { .. })));
    }
}
