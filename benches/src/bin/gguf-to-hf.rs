//! Writes a GGUF file's model as a Hugging Face directory: `gguf-to-hf MODEL.gguf DIRECTORY [--dtype bf16]`.

use std::process::ExitCode;

use controlgen_core::{Error, Result};

fn run(arguments: &[String]) -> Result<()> {
    let usage = "MODEL.gguf DIRECTORY [--dtype f32|f16|bf16]";
    let (file, directory, dtype) = match arguments {
        [file, directory] => (file, directory, "bf16"),
        [file, directory, flag, dtype] if flag == "--dtype" => (file, directory, dtype.as_str()),
        _ => return Err(Error::value("arguments", usage, arguments.join(" "))),
    };
    controlgen_text::gguf::write_directory(file, directory, controlgen_core::kind(dtype)?)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    benches::exit(run(&arguments))
}
