//! README's code is the downstream crate's code, which is built and run.

use std::fs;
use std::path::Path;

use crate::failure::{Failure, Result};

/// Demands that README's first block of Rust be `src/main.rs` of the downstream crate, and that another be its
/// `build.rs`.
pub fn check(root: &Path) -> Result<()> {
    let read = |name: &str| {
        let path = root.join(name);
        fs::read_to_string(&path).map_err(|error| Failure::io("reading", path, error))
    };
    let readme = read("README.md")?;
    let blocks = rust_blocks(&readme);
    let Some(first) = blocks.first() else {
        return Err(Failure::Check(
            "README.md: expected a block of Rust code, the quickstart, found none".into(),
        ));
    };
    same("README.md's first block of Rust code", first, MAIN, &read(MAIN)?)?;
    let build = read(BUILD)?;
    if blocks.iter().any(|block| block.trim() == build.trim()) {
        return Ok(());
    }
    // For the message, the block that is likely meant.
    match blocks.iter().find(|block| block.contains("rustc-link-arg")) {
        Some(block) => same("README.md's template of a build script", block, BUILD, &build),
        None => Err(Failure::Check(format!(
            "README.md: expected a block of Rust code equal to {BUILD}, found none"
        ))),
    }
}

const MAIN: &str = "benches/downstream/src/main.rs";
const BUILD: &str = "benches/downstream/build.rs";

/// The blocks of Rust code in a Markdown text, in order.
fn rust_blocks(markdown: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut open: Option<(bool, Vec<&str>)> = None;
    for line in markdown.lines() {
        let Some(info) = line.trim_start().strip_prefix("```") else {
            if let Some((_, lines)) = &mut open {
                lines.push(line);
            }
            continue;
        };
        open = match open {
            None => {
                Some((info.split(',').next().is_some_and(|language| language.trim() == "rust"), Vec::new()))
            }
            Some((is_rust, lines)) => {
                if is_rust {
                    blocks.push(lines.join("\n"));
                }
                None
            }
        };
    }
    blocks
}

/// Demands that two texts be equal but for white space around them; names the first line that differs otherwise.
fn same(left_name: &str, left: &str, right_name: &str, right: &str) -> Result<()> {
    let (left, right) = (left.trim(), right.trim());
    if left == right {
        return Ok(());
    }
    let (mut left_lines, mut right_lines) = (left.lines(), right.lines());
    let mut number = 0;
    loop {
        number += 1;
        let pair = (left_lines.next(), right_lines.next());
        if pair.0 != pair.1 || pair.0.is_none() {
            let shown =
                |line: Option<&str>| line.map_or_else(|| "no more lines".into(), |l| format!("{l:?}"));
            return Err(Failure::Check(format!(
                "{left_name} and {right_name} differ in line {number}: {} and {}",
                shown(pair.0),
                shown(pair.1)
            )));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const README: &str = "\
# Name
```toml
[dependencies]
```
```rust
fn main() {
    run();
}
```
text ``` not a fence
```rust,no_run
fn build() {} // rustc-link-arg
```
```rusty
no
```
";

    fn checkout(main: &str, build: &str, readme: &str) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir_all(home.path().join("benches/downstream/src")).unwrap();
        for (name, text) in [(MAIN, main), (BUILD, build), ("README.md", readme)] {
            fs::write(home.path().join(name), text).unwrap();
        }
        home
    }

    #[test]
    fn blocks_of_rust_are_found() {
        assert_eq!(rust_blocks(README), ["fn main() {\n    run();\n}", "fn build() {} // rustc-link-arg"]);
        assert!(rust_blocks("```rust\nnever closed").is_empty());
    }

    #[test]
    fn equal_code_passes() {
        let home = checkout("\nfn main() {\n    run();\n}\n", "fn build() {} // rustc-link-arg\n", README);
        check(home.path()).unwrap();
    }

    #[test]
    fn the_first_difference_is_named() {
        let main = "fn main() {\n    run();\n}\n";
        let home = checkout("fn main() {\n    walk();\n}\n", "fn build() {} // rustc-link-arg\n", README);
        let text = check(home.path()).unwrap_err().to_string();
        assert!(text.contains("differ in line 2: \"    run();\" and \"    walk();\""), "{text}");
        let home = checkout("fn main() {\n    run();\n}\n// more\n", "", README);
        let text = check(home.path()).unwrap_err().to_string();
        assert!(text.contains("differ in line 4: no more lines and \"// more\""), "{text}");
        let home = checkout(main, "fn build() {} // rustc-link-args\n", README);
        let text = check(home.path()).unwrap_err().to_string();
        assert!(text.contains("template of a build script"), "{text}");
        let home = checkout(main, "", "# Name\n");
        let text = check(home.path()).unwrap_err().to_string();
        assert!(text.contains("found none"), "{text}");
    }

    #[test]
    fn a_difference_in_the_bytes_between_lines_is_noticed() {
        assert!(same("a", "x\r\ny", "b", "x\ny").is_err());
    }
}
