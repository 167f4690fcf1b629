//! A listener that checks what it is told.

use controlgen_core::progress::Flow;
use controlgen_core::{Result, Rows};
use controlgen_text::search::{After, Chosen, Listener};

/// Knows what each row has said by what it was told alone; ends texts that say `stop`, and the run at a step.
pub struct Told {
    pub rows: Vec<Vec<i64>>,
    pub stop: Vec<i64>,
    pub steps: usize,
    pub cancel_at: usize,
}

impl Told {
    pub fn new(prompts: usize) -> Self {
        Self { rows: vec![Vec::new(); prompts], stop: vec![-1], steps: 0, cancel_at: 0 }
    }
}

impl Listener for Told {
    fn token(&mut self, chosen: Chosen<'_>) -> Result<After> {
        let said = &mut self.rows[chosen.row];
        said.push(chosen.token);
        assert_eq!(*said, chosen.so_far.ids, "a row is told of all its tokens and of no other");
        Ok(if said.ends_with(&self.stop) { After::Finish } else { After::Continue })
    }
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.rows.reorder(rows)
    }
    fn step(&mut self, tokens: u64) -> Flow {
        assert!(tokens > 0);
        self.steps += 1;
        if self.steps == self.cancel_at { Flow::Stop } else { Flow::Continue }
    }
}
