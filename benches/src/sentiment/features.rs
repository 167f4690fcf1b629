//! What a language model makes of the reviews: hidden states, kept on disk, so that heads can be trained many times.

use std::path::{Path, PathBuf};
use std::time::Instant;

use controlgen_core::checkpoint::{Safetensors, TensorSource, save};
use controlgen_core::{Error, Placement, Result};
use controlgen_text::TextModel;
use controlgen_text::classifiers::{Example, Labelled, LmStates, padded_text};
use tch::{Device, Kind, Tensor};

use super::texts::{self, PARTS};

/// Of a text every third prefix is kept, and the whole.
const STRIDE: usize = 3;
/// Texts of a file.
const CHUNK: usize = 256;
/// Texts of a pass.
const BATCH: usize = 16;

/// The site that reads the normed residual stream before a block.
pub fn site(block: i64) -> String {
    format!("model.layers.{block}.self_attn.q_proj")
}

/// What to run on.
pub struct Run {
    pub texts: PathBuf,
    pub model: PathBuf,
    /// A folder.
    pub out: PathBuf,
    /// The blocks before which states are taken, least first: the judge reads the first, the guide the last. Of the last
    /// the states of prefixes are kept too.
    pub blocks: Vec<i64>,
    /// How many tokens of a text.
    pub tokens: usize,
    /// How many of IMDB's reviews of the first two parts, and all of the other source's, which are short.
    pub reviews: [usize; 2],
    /// How many texts of the held-out part.
    pub held_out: usize,
}

/// The texts of each part that features are made of.
pub fn chosen(run: &Run) -> Result<Vec<Labelled>> {
    let parts = texts::parts(&run.texts)?;
    let cut = |(i, part): (usize, &Labelled)| {
        let Some(&most) = run.reviews.get(i) else {
            return part.with(part.examples().iter().take(run.held_out).cloned().collect());
        };
        let mut left = most;
        let keep = |example: &&Example| {
            let long = example.group == "imdb";
            let keep = !long || left > 0;
            left -= usize::from(long && keep);
            keep
        };
        part.with(part.examples().iter().filter(keep).cloned().collect())
    };
    parts.iter().enumerate().map(cut).collect()
}

/// The file of a chunk.
fn file(folder: &Path, part: usize, chunk: usize) -> PathBuf {
    folder.join(format!("{}-{chunk:03}.safetensors", PARTS[part]))
}

/// Writes the files that are not there yet: the parts in turn, so that an unfinished run has some of each.
pub fn extract(run: &Run) -> Result<()> {
    std::fs::create_dir_all(&run.out).map_err(|source| Error::io(&run.out, source))?;
    let parts = chosen(run)?;
    let chunks: Vec<Vec<&[Example]>> =
        parts.iter().map(|part| part.examples().chunks(CHUNK).collect()).collect();
    let most = chunks.iter().map(Vec::len).max().unwrap_or(0);
    let turn = (0..most).flat_map(|chunk| (0..parts.len()).map(move |part| (part, chunk)));
    let missing: Vec<(usize, usize)> = turn
        .filter(|&(part, chunk)| chunk < chunks[part].len() && !file(&run.out, part, chunk).exists())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let _guard = tch::no_grad_guard();
    let model = TextModel::open(&run.model, Placement::new(Device::Cpu, Kind::BFloat16))?;
    let states = LmStates::at(model.lm(), &run.blocks.iter().map(|&block| site(block)).collect::<Vec<_>>())?;
    for (done, &(part, chunk)) in missing.iter().enumerate() {
        let begin = Instant::now();
        let texts = chunks[part][chunk];
        let ids = texts
            .iter()
            .map(|example| texts::ending(model.tokenizer(), &example.text, run.tokens))
            .collect::<Result<Vec<_>>>()?;
        let tokens: usize = ids.iter().map(Vec::len).sum();
        write(&file(&run.out, part, chunk), &states, texts, &ids)?;
        let rate = tokens as f64 / begin.elapsed().as_secs_f64();
        println!("{} of {}: {} {chunk}, {rate:.0} tokens/s", done + 1, missing.len(), PARTS[part]);
    }
    Ok(())
}

/// One file: of each text the mean and the last of its states `[N, blocks, D]`; of every third prefix the states before
/// the last block `[M, D]`, and the index of its text.
fn write(path: &Path, states: &LmStates, texts: &[Example], ids: &[Vec<i64>]) -> Result<()> {
    let blocks = states.names().len() as i64;
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|&i| ids[i].len());
    let (mut means, mut lasts) = (Vec::new(), Vec::new());
    let (mut prefixes, mut owners, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
    for batch in order.chunks(BATCH) {
        let rows: Vec<&[i64]> = batch.iter().map(|&i| &ids[i][..]).collect();
        let found = states.of(&padded_text(&rows)?)?; // (B, T, blocks · D)
        for (row, &i) in (0i64..).zip(batch) {
            let len = ids[i].len() as i64;
            let of_row = found.f_get(row)?.f_narrow(0, 0, len)?; // (T, blocks · D)
            let split = |x: Tensor| x.f_view([blocks, -1])?.f_to_kind(Kind::Half);
            means.push((i, split(of_row.f_mean_dim(0i64, false, Kind::Float)?)?));
            lasts.push((i, split(of_row.f_get(len - 1)?)?));
            let d = of_row.size()[1].div_euclid(blocks);
            let kept: Vec<i64> =
                (0..len).filter(|t| t % STRIDE as i64 == i as i64 % STRIDE as i64 || *t == len - 1).collect();
            let at = Tensor::f_from_slice(&kept)?;
            let block = of_row.f_narrow(1, (blocks - 1) * d, d)?;
            prefixes.push(block.f_index_select(0, &at)?.f_to_kind(Kind::Half)?);
            owners.extend(kept.iter().map(|_| i as i64));
            lengths.extend(kept);
        }
    }
    let stack = |mut all: Vec<(usize, Tensor)>| {
        all.sort_by_key(|(i, _)| *i);
        Tensor::f_stack(&all.into_iter().map(|(_, tensor)| tensor).collect::<Vec<_>>(), 0)
    };
    let labels: Vec<i64> = texts.iter().map(|example| example.label as i64).collect();
    let tensors = [
        ("mean".to_owned(), stack(means)?),
        ("last".to_owned(), stack(lasts)?),
        ("prefix".to_owned(), Tensor::f_cat(&prefixes, 0)?),
        ("prefix_text".to_owned(), Tensor::f_from_slice(&owners)?),
        ("prefix_position".to_owned(), Tensor::f_from_slice(&lengths)?),
        ("label".to_owned(), Tensor::f_from_slice(&labels)?),
    ];
    save(path, &tensors, &[])
}

/// Features of the texts of a part that a folder has, and their labels.
pub struct Features {
    files: Vec<Safetensors>,
}

impl Features {
    /// The files of a part.
    pub fn open(folder: &Path, part: usize) -> Result<Self> {
        let files = (0..).map(|chunk| file(folder, part, chunk)).take_while(|path| path.exists());
        let files = files.map(Safetensors::open).collect::<Result<Vec<_>>>()?;
        if files.is_empty() {
            let expected = "one that `sentiment features` wrote";
            return Err(Error::value("folder of features", expected, folder.display()));
        }
        Ok(Self { files })
    }

    /// A tensor of all files, one after the other, floating-point ones in f32.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let each = self.files.iter().map(|file| read(file, name)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&each, 0)?)
    }

    /// The states of prefixes, f32 `[M, D]`, and the labels of the texts that they are of.
    pub fn prefixes(&self) -> Result<(Tensor, Vec<i64>)> {
        let mut labels = Vec::new();
        for file in &self.files {
            let of_text = read(file, "label")?.f_index_select(0, &read(file, "prefix_text")?)?;
            labels.extend(Vec::<i64>::try_from(of_text)?);
        }
        Ok((self.get("prefix")?, labels))
    }
}

fn read(file: &Safetensors, name: &str) -> Result<Tensor> {
    let missing = || Error::format(file.what(), format!("expected a tensor `{name}`, found none"));
    let info = file.info(name).ok_or_else(missing)?;
    let kind = if info.kind == Kind::Int64 { Kind::Int64 } else { Kind::Float };
    let mut tensor = Tensor::f_empty(&info.shape, (kind, Device::Cpu))?;
    file.read(name, &mut tensor)?;
    Ok(tensor)
}
