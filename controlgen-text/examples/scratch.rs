use controlgen_core::{Placement, TokenControl};
use controlgen_text::TextModel;
use controlgen_text::grammar::*;
use serde_json::json;
use std::time::Instant;
fn main() {
    let model =
        TextModel::open("/work/main/.controlgen/models/smollm2-135m-instruct/hf", Placement::CPU).unwrap();
    let vocab = Vocabulary::new(model.tokenizer(), model.eos()).unwrap();
    let schema = json!({"type":"object","properties":{"name":{"type":"string","maxLength":20},"age":{"type":"integer","minimum":0,"maximum":120},"tags":{"type":"array","items":{"enum":["red","green","blue"]},"minItems":1,"maxItems":3},"email":{"type":"string","format":"email"}},"required":["name","age","tags"],"additionalProperties":false});
    let schema2 = json!({"type":"object","properties":{"first_name":{"type":"string","maxLength":20},"last_name":{"type":"string","maxLength":20},"date_of_birth":{"type":"string","format":"date"},"address":{"type":"object","properties":{"street":{"type":"string","maxLength":20},"house_number":{"type":"integer","minimum":0,"maximum":120},"postal_code":{"type":"string","pattern":"^[0-9]{5}$"}},"required":["street","house_number","postal_code"],"additionalProperties":false},"favourite_colour":{"enum":["red","green","blue"]},"is_subscribed":{"type":"boolean"}},"required":["first_name","last_name","date_of_birth","address","favourite_colour","is_subscribed"],"additionalProperties":false});
    let gs = vec![
        ("json", Grammar::json_schema(&schema).unwrap()),
        ("json2", Grammar::json_schema(&schema2).unwrap()),
        ("compact", JsonGrammar::new(&schema2).unwrap().whitespace(Whitespace::Compact).unwrap().into()),
        ("lark", Grammar::lark("start: expr\nexpr: term ((\"+\"|\"-\") term)*\nterm: factor ((\"*\"|\"/\") factor)*\nfactor: NUM | \"(\" expr \")\"\nNUM: /[0-9]{1,4}/\n").unwrap()),
    ];
    for (name, g) in &gs {
        let c = GrammarControl::new(g, &vocab).unwrap();
        let (mut t0, mut t1, mut n, mut same) = (0.0, 0.0, 0, 0);
        for seed in 0..2 {
            let run = |jump| {
                let t = Instant::now();
                let r = model
                    .generate("A person of interest, described in JSON:\n")
                    .with(c.clone().jump_forward(jump))
                    .sample(seed)
                    .max_new_tokens(150)
                    .run()
                    .unwrap();
                (t.elapsed().as_secs_f64(), r)
            };
            let (a, ra) = run(false);
            let (b, rb) = run(true);
            t0 += a;
            t1 += b;
            n += ra.completions[0].ids.len();
            same += usize::from(
                ra.completions[0].ids == rb.completions[0].ids
                    && ra.completions[0]
                        .logprobs
                        .iter()
                        .zip(&rb.completions[0].logprobs)
                        .all(|(a, b)| (a - b).abs() < 1e-3)
                    && ra.completions[0].logprobs.len() == rb.completions[0].logprobs.len(),
            );
            if seed == 0 {
                println!("{}", rb.text());
            }
        }
        println!("{name}: {n} tokens, {t0:.2} s, {t1:.2} s: {:.2}; same {same}", t0 / t1);
        let mut ts = vec![];
        for seed in 0..2 {
            let r = model
                .generate("A person of interest, described in JSON:\n")
                .with(c.clone())
                .sample(seed)
                .max_new_tokens(100)
                .run()
                .unwrap();
            let mut st = c.start(&[vec![1]]).unwrap();
            for &id in &r.completions[0].ids {
                let l = tch::Tensor::zeros([1, 49152], tch::kind::FLOAT_CPU);
                let t = Instant::now();
                let _ = c.score(&mut st, l).unwrap();
                ts.push(t.elapsed());
                c.advance(&mut st, &[id]).unwrap();
            }
        }
        ts.sort();
        println!("masks p50 {:?} p99 {:?} max {:?}", ts[ts.len() / 2], ts[ts.len() * 99 / 100], ts.last());
    }
}
