use controlgen_core::{Placement, Result};
use controlgen_text::TextModel;
use controlgen_text::controls::{BannedWords, NoRepeatNgram, Temperature, TopP};

fn main() -> Result<()> {
    // A Hugging Face directory, or a GGUF file.
    let model = TextModel::open(".controlgen/models/smollm2-135m-instruct/hf", Placement::CPU)?;
    let story = model
        .generate("In the forest, the knight met")
        .with(BannedWords::words(model.tokenizer(), ["wolf", "king"])?)
        .with(NoRepeatNgram::new(3)?)
        .with(Temperature::new(0.8)?)
        .with(TopP::new(0.95)?)
        .sample(42)
        .max_new_tokens(40)
        .on_text(|piece| print!("{}", piece.text))
        .run()?;
    println!("\n({:.1} tokens a second)", story.tokens_per_second());
    Ok(())
}
