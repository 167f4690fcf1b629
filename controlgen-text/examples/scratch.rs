use std::time::Instant;
use controlgen_core::{Placement, TokenControl};
use controlgen_text::TextModel;
use controlgen_text::grammar::*;
use serde_json::json;
fn main() {
    let model = TextModel::open("/work/main/.controlgen/models/smollm2-135m-instruct/hf", Placement::CPU).unwrap();
    let t = Instant::now();
    let vocab = Vocabulary::new(model.tokenizer(), model.eos()).unwrap();
    println!("vocabulary {:?} eos {:?}", t.elapsed(), model.eos());
    let schema = json!({"type":"object","properties":{"name":{"type":"string","maxLength":20},"age":{"type":"integer","minimum":0,"maximum":120},"tags":{"type":"array","items":{"enum":["red","green","blue"]},"minItems":1,"maxItems":3},"email":{"type":"string","format":"email"}},"required":["name","age","tags"],"additionalProperties":false});
    let gs = vec![
        ("json", Grammar::json_schema(&schema).unwrap()),
        ("flex", JsonGrammar::new(&schema).unwrap().whitespace(Whitespace::Flexible{most:4}).unwrap().into()),
        ("regex", Grammar::regex(r"(Monday|Tuesday|Sunday), [0-3]?[0-9] (March|April) 19[0-9]{2}").unwrap()),
        ("lark", Grammar::lark("start: expr\nexpr: term ((\"+\"|\"-\") term)*\nterm: factor ((\"*\"|\"/\") factor)*\nfactor: NUM | \"(\" expr \")\"\nNUM: /[0-9]{1,4}/\n").unwrap()),
        ("choices", Grammar::choices(["yes", "no", "may \"be\""]).unwrap()),
    ];
    for (name, g) in &gs {
        let t = Instant::now();
        let c = GrammarControl::new(g, &vocab).unwrap();
        println!("== {name} compile {:?}", t.elapsed());
        let t = Instant::now(); let _ = c.clone(); println!("deep clone {:?}", t.elapsed());
        for seed in 0..3 {
            let r = model.generate("A person of interest, described in JSON:\n").with(c.clone()).sample(seed).max_new_tokens(100).run().unwrap();
            println!("{} {:?} {:?}", r.completions[0].ids.len(), r.text(), r.completions[0].finish);
        }
        let r = model.generate("A person of interest, described in JSON:\n").with(c.clone()).beam_search(controlgen_text::search::BeamSearch::new(3).unwrap()).max_new_tokens(60).run();
        println!("beam {:?}", r.map(|r| (r.text().to_owned(), r.completions[0].finish.clone())));
        // mask time
        let r = model.generate("A person of interest, described in JSON:\n").with(c.clone()).sample(5).max_new_tokens(100).run().unwrap();
        let mut st = c.start(&[vec![1]]).unwrap();
        let mut ts = vec![];
        let mut fk = vec![];
        for &id in &r.completions[0].ids {
            let l = tch::Tensor::zeros([1, 49152], tch::kind::FLOAT_CPU);
            let t = Instant::now(); let _ = c.score(&mut st, l).unwrap(); ts.push(t.elapsed());
            let t = Instant::now(); use controlgen_core::Rows; st.reorder(&[0,0]).unwrap(); fk.push(t.elapsed()); st.reorder(&[1]).unwrap();
            c.advance(&mut st, &[id]).unwrap();
        }
        println!("masks {:?}", ts); println!("forks {:?}", fk);
    }
}
