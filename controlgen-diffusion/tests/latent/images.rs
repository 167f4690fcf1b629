//! Image files.

use std::path::Path;

use controlgen_core::{Error, Result};
use controlgen_diffusion::image::{
    Parameters, levels, load_image, load_mask, load_parameters, resize, save_image, save_images,
};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::support::{cases, distance, fixture};

type Load = fn(&Path, Option<[i64; 2]>) -> Result<Tensor>;

fn file(name: &str) -> std::path::PathBuf {
    fixture("image").join(name)
}

fn planes(images: &Tensor) -> Tensor {
    levels(images).unwrap().permute([0, 3, 1, 2])
}

/// `NAME.HxW` of a fixture's tensors.
fn sizes(name: &str) -> Vec<([i64; 2], Tensor)> {
    let of = |(key, tensor): (String, Tensor)| {
        let (h, w) = key.strip_prefix(&format!("{name}."))?.split_once('x')?;
        Some(([h.parse().ok()?, w.parse().ok()?], tensor))
    };
    let found: Vec<_> = cases("image").into_iter().filter_map(of).collect();
    assert_eq!(found.len(), 6, "{name}");
    found
}

#[test]
fn files_are_read_and_resized_as_by_pillow() {
    for name in ["rgb", "gray", "palette", "opaque"] {
        for (size, expected) in sizes(name) {
            let found = load_image(file(&format!("{name}.png")), Some(size)).unwrap();
            assert_eq!(distance(&planes(&found), &expected), 0.0, "{name}, {size:?}");
        }
        let whole = load_image(file(&format!("{name}.png")), None).unwrap();
        let expected = &cases("image")[&format!("{name}.21x34")];
        assert_eq!(distance(&planes(&whole), expected), 0.0, "{name}");
        let size = [9, 50];
        let later = resize(&whole, size).unwrap();
        assert!(later.equal(&load_image(file(&format!("{name}.png")), Some(size)).unwrap()));
    }
    // 16 bits that are 8 bits twice.
    let (gray, sixteen) = (load_image(file("gray.png"), None), load_image(file("gray16.png"), None));
    assert!(gray.unwrap().equal(&sixteen.unwrap()));
}

#[test]
fn photographs_are_read_the_right_way_up() {
    for name in ["photo.jpg", "turned.jpg"] {
        let found = load_image(file(name), None).unwrap();
        let far = distance(&planes(&found), &cases("image")[name]);
        // Decoders of JPEG may round otherwise.
        assert!(far <= 2.0, "{name}: {far} levels");
    }
}

#[test]
fn masks_are_diffusers() {
    for name in ["rgb", "gray"] {
        for (size, expected) in sizes(&format!("{name}.mask")) {
            let found = load_mask(file(&format!("{name}.png")), Some(size)).unwrap();
            assert_eq!(distance(&found, &expected), 0.0, "{name}, {size:?}");
        }
    }
}

#[test]
fn levels_are_rounded_as_by_diffusers() {
    let cases = cases("image");
    assert!(levels(&cases["pixels"]).unwrap().equal(&cases["levels"]));
    // Of any layout and type.
    let pixels = &cases["pixels"].to_kind(Kind::Double).transpose(2, 3);
    assert!(levels(pixels).unwrap().equal(&cases["levels"].transpose(1, 2)));
}

#[test]
fn files_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let image = load_image(file("rgb.png"), None).unwrap();
    save_image(at("a.PNG"), &image, None).unwrap();
    assert!(load_image(at("a.PNG"), None).unwrap().equal(&image));
    assert_eq!(load_parameters(at("a.PNG")).unwrap(), None);
    // One channel, no batch.
    save_image(at("gray.png"), &image.get(0).narrow(0, 1, 1), None).unwrap();
    let gray = load_image(at("gray.png"), None).unwrap();
    assert!(gray.equal(&image.narrow(1, 1, 1).expand([-1, 3, -1, -1], false)));
    // JPEG loses some.
    save_image(at("a.jpg"), &load_image(file("photo.jpg"), None).unwrap(), None).unwrap();
    let far = distance(
        &planes(&load_image(at("a.jpg"), None).unwrap()),
        &planes(&load_image(file("photo.jpg"), None).unwrap()),
    );
    assert!(far > 0.0 && far < 30.0, "{far}");
    // By what is in it, whatever its name.
    std::fs::rename(at("a.jpg"), at("b.png")).unwrap();
    assert_eq!(load_image(at("b.png"), None).unwrap().size(), [1, 3, 21, 34]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3, "nothing is left over");
}

#[test]
fn parameters_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let image = load_image(file("rgb.png"), None).unwrap();
    let parameters = |seed| Parameters {
        prompt: Some("ein Fuchs, 狐 \"x\"\n".into()),
        negative_prompt: Some(String::new()),
        steps: Some(25),
        guidance_scale: Some(7.5),
        seed: Some(seed),
        sampler: Some("Ddim".into()),
        height: Some(21),
        width: None,
        model: Some("stable-diffusion".into()),
        more: [("clip_skip".to_owned(), json!([1, null]))].into_iter().collect(),
    };
    let both = Tensor::cat(&[&image, &-&image], 0);
    let paths = ["a.png", "b.png"].map(|name| folder.path().join(name));
    save_images(&paths, &both, &[parameters(u64::MAX), parameters(0)]).unwrap();
    assert_eq!(load_parameters(&paths[0]).unwrap(), Some(parameters(u64::MAX)));
    assert_eq!(load_parameters(&paths[1]).unwrap(), Some(parameters(0)));
    assert!(distance(&load_image(&paths[1], None).unwrap(), &-&image) < 1e-6);
    // Another tool's, in Latin-1; of other types; no JSON.
    let chunk = |keyword: &str, text: &str| {
        let path = folder.path().join("c.png");
        let mut encoder = png::Encoder::new(std::fs::File::create(&path).unwrap(), 1, 1);
        encoder.add_text_chunk(keyword.to_owned(), text.to_owned()).unwrap();
        encoder.write_header().unwrap().write_image_data(&[0]).unwrap();
        load_parameters(&path)
    };
    assert_eq!(chunk("parameters", r#"{"seed": 3}"#).unwrap().unwrap().seed, Some(3));
    assert_eq!(chunk("comment", r#"{"seed": 3}"#).unwrap(), None);
    for bad in ["a fox", "[]", r#"{"seed": -1}"#, r#"{"prompt": 1}"#, r#"{"guidance_scale": "7"}"#] {
        assert!(matches!(chunk("parameters", bad), Err(Error::Format { .. })), "{bad}");
    }
}

#[test]
fn what_cannot_be_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let loads: [Load; 2] = [|path, size| load_image(path, size), |path, size| load_mask(path, size)];
    for load in loads {
        let error = |name: &Path| load(name, None).err().unwrap();
        assert!(matches!(error(&at("absent.png")), Error::Io { .. }));
        let hidden = error(&file("transparent.png"));
        assert!(matches!(&hidden, Error::Unsupported { what, .. } if what.contains("Rgba8")), "{hidden}");
        std::fs::write(at("text.png"), "no image").unwrap();
        assert!(matches!(error(&at("text.png")), Error::Format { .. }));
        std::fs::write(at("anim.gif"), b"GIF89a\x01\0\x01\0\0\0\0;").unwrap();
        assert!(matches!(error(&at("anim.gif")), Error::Unsupported { .. }), "{}", error(&at("anim.gif")));
        let whole = std::fs::read(file("rgb.png")).unwrap();
        std::fs::write(at("cut.png"), &whole[..whole.len() - 700]).unwrap();
        assert!(matches!(error(&at("cut.png")), Error::Format { .. } | Error::Io { .. }));
        for size in [[0, 8], [8, -1]] {
            assert!(matches!(load(&file("rgb.png"), Some(size)), Err(Error::Value { .. })));
        }
    }
    assert!(matches!(load_parameters(file("photo.jpg")), Err(Error::Format { .. })));
}

#[test]
fn what_cannot_be_written_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let image = Tensor::zeros([1, 3, 4, 4], (Kind::Float, Device::Cpu));
    let save = |name: &str, image: &Tensor| save_image(at(name), image, None).err().unwrap();
    assert!(matches!(save("no/such/folder.png", &image), Error::Io { .. }));
    assert!(matches!(save("a.webp", &image), Error::Unsupported { .. }));
    assert!(matches!(save("a", &image), Error::Unsupported { .. }));
    assert!(matches!(save("a.png", &image.expand([2, -1, -1, -1], false)), Error::Shape { .. }));
    assert!(matches!(save("a.png", &image.narrow(1, 0, 2)), Error::Shape { .. }));
    assert!(matches!(save("a.png", &image.to_kind(Kind::Uint8)), Error::Kind { .. }));
    let parameters = Parameters::default();
    assert!(matches!(save_image(at("a.jpg"), &image, Some(&parameters)), Err(Error::Unsupported { .. })));
    // The second of a batch is not a number: neither is written, and an old file stays.
    std::fs::write(at("a.png"), "old").unwrap();
    for (bad, word) in [(f64::NAN, "NaN"), (f64::INFINITY, "infinity")] {
        let both = Tensor::cat(&[&image, &image.full_like(bad)], 0);
        match save_images(&[at("a.png"), at("b.png")], &both, &[]) {
            Err(Error::NotFinite { at, found, .. }) => assert_eq!((&*at, &*found), ("row 1", word)),
            other => panic!("{other:?}"),
        }
    }
    let both = image.expand([2, -1, -1, -1], false);
    assert!(matches!(save_images(&[at("a.png")], &both, &[]), Err(Error::Value { .. })));
    let few = save_images(&[at("a.png"), at("b.png")], &both, &[Parameters::default()]);
    assert!(matches!(few, Err(Error::Value { .. })));
    let unknown = save_images(&[at("a.png"), at("b.tiff")], &both, &[]);
    assert!(matches!(unknown, Err(Error::Unsupported { .. })));
    assert_eq!(std::fs::read(at("a.png")).unwrap(), b"old");
    assert!(matches!(resize(&both, [0, 1]), Err(Error::Value { .. })));
}
