//! scratch
use controlgen_core::{Placement, Result};
use controlgen_text::TextModel;
use controlgen_text::controls::LexicalConstraints;
use controlgen_text::lexical::{Clause, Clauses};
use controlgen_text::search::{BeamSearch, GridBeamSearch, NeuroLogic};
use controlgen_text::words::TokenTrie;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let get = |k: &str, d: f64| {
        args.iter().find_map(|a| a.strip_prefix(&format!("{k}="))).map_or(d, |v| v.parse().unwrap())
    };
    let t = std::time::Instant::now();
    let model = TextModel::open(".controlgen/models/smollm2-135m-instruct/hf", Placement::CPU)?;
    println!("open {:?}", t.elapsed());
    let t = std::time::Instant::now();
    let trie = TokenTrie::new(model.tokenizer())?;
    println!("trie {:?} {trie:?}", t.elapsed());
    let sets = [
        vec![
            vec!["dog", "dogs"],
            vec!["frisbee", "frisbees"],
            vec!["catch", "catches", "caught", "catching"],
            vec!["throw", "throws", "threw", "thrown", "throwing"],
        ],
        vec![vec!["piano", "pianos"], vec!["window", "windows"], vec!["rain", "rains", "rained", "raining"]],
        vec![
            vec!["apple", "apples"],
            vec!["bicycle", "bicycles"],
            vec!["doctor", "doctors"],
            vec!["mountain", "mountains"],
            vec!["sing", "sings", "sang", "sung", "singing"],
        ],
    ];
    let prompt = args.iter().find_map(|a| a.strip_prefix("prompt=")).unwrap_or("Once upon a time");
    for set in sets.into_iter().take(get("sets", 3.0) as usize) {
        let t = std::time::Instant::now();
        let clauses = Clauses::new(&trie, set.into_iter().map(Clause::any))?;
        println!("clauses {:?}", t.elapsed());
        let beams = BeamSearch::new(get("beams", 20.0) as usize)?.length_penalty(get("lp", 1.0))?;
        let mut search = NeuroLogic::new(beams, &clauses)
            .tolerance(get("tol", 2.0) as usize)
            .gap(get("gap", 4.0) as usize)
            .reward(get("reward", 1.25))?;
        if get("ahead", 0.0) > 0.0 {
            search = search.look_ahead(get("ahead", 0.0) as usize, get("weight", 0.5))?;
        }
        if get("plain", 0.0) > 0.0 {
            let t = std::time::Instant::now();
            let done =
                model.generate(prompt).search(beams).n(3).max_new_tokens(get("len", 32.0) as usize).run()?;
            println!("plain {:?} {:?}", t.elapsed(), done.text());
        }
        let t = std::time::Instant::now();
        let len = get("len", 32.0) as usize;
        let method = args.iter().find_map(|a| a.strip_prefix("method=")).unwrap_or("neuro");
        let mut run = model.generate(prompt).n(3).max_new_tokens(len);
        if get("ngram", 0.0) > 0.0 {
            run = run.with(controlgen_text::controls::NoRepeatNgram::new(get("ngram", 0.0) as usize)?);
        }
        run = match method {
            "grid" => run.search(GridBeamSearch::new(beams, &clauses)),
            "sample" => run
                .with(
                    LexicalConstraints::new(&clauses, model.eos().to_vec())?
                        .within(len)
                        .gap(get("gap", 3.0) as usize)
                        .reward(get("reward", 6.0))?,
                )
                .with(controlgen_text::controls::TopP::new(get("p", 0.9))?)
                .sample(get("seed", 1.0) as u64)
                .n(get("n", 8.0) as usize),
            _ => run.search(search),
        };
        let done = run.run()?;
        println!("{:?} {:?}", t.elapsed(), clauses);
        for c in &done.completions {
            let ppl = (-c.logprobs.iter().sum::<f64>() / c.logprobs.len() as f64).exp();
            let unmet = clauses.unmet_after(prompt, &c.text);
            println!("  {:.2} ppl {ppl:.1} {unmet:?} {:?} {:?}", c.score, c.finish, c.text);
        }
    }
    Ok(())
}
