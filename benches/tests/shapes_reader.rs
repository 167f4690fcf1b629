//! The reader of shapes against what was drawn.
#![allow(clippy::unwrap_used, clippy::panic)]

use benches::shapes::measure::misread;
use benches::shapes::{Caption, Object, Reader, Renderer, Scene, Split};
use controlgen_core::noise::Noise;

#[test]
fn what_was_drawn_is_read() {
    assert_eq!(misread(32, 300, 0.0, 7).unwrap(), 0);
    assert_eq!(misread(32, 300, 0.05, 7).unwrap(), 0);
    assert_eq!(misread(64, 20, 0.05, 7).unwrap(), 0);
}

#[test]
fn captions_hold_of_their_pictures_only() {
    let mut stream = Noise::seeded(8).stream(0);
    let scenes: Vec<Scene> = (0..60).map(|_| Scene::sample(&mut stream, Split::Training)).collect();
    let captions: Vec<Caption> = scenes.iter().map(|scene| Caption::of(scene, &mut stream)).collect();
    let read = Reader::new(32).unwrap().read(&Renderer::new(32).unwrap().render(&scenes).unwrap()).unwrap();
    let mut others = 0;
    for (k, caption) in captions.iter().enumerate() {
        assert!(caption.named.holds_of(&read[k]), "{}: {:?}", caption.text, read[k]);
        others += (0..60).filter(|&other| other != k && caption.named.holds_of(&read[other])).count();
    }
    // Of 3,540 pairs few agree by chance.
    assert!(others < 60, "{others}");
}

#[test]
fn an_object_more_or_elsewhere_is_no_success() {
    let mut stream = Noise::seeded(9).stream(0);
    for _ in 0..50 {
        let scene = Scene::pair(&mut stream, Split::Training);
        let mut named = Caption::of(&scene, &mut stream).named;
        assert!(named.holds_of(&scene));
        let mut one = scene.clone();
        one.objects.truncate(1);
        assert!(!named.holds_of(&one));
        let mut three = scene.clone();
        three.objects.push(Object { center: [16.0, 16.0], ..scene.objects[0] });
        assert!(!named.holds_of(&three));
        named.position = Some(scene.positions()[0].opposite());
        assert!(!named.holds_of(&scene));
    }
}

#[test]
fn other_pictures_are_refused() {
    assert!(Reader::new(24).is_err());
    assert!(Reader::new(48).is_err());
    let reader = Reader::new(32).unwrap();
    let zeros = |shape: &[i64]| tch::Tensor::zeros(shape, tch::kind::FLOAT_CPU);
    assert!(reader.read(&zeros(&[3, 32, 32])).is_err());
    assert!(reader.read(&zeros(&[1, 3, 16, 16])).is_err());
    assert!(reader.read(&(zeros(&[1, 3, 32, 32]) + f64::NAN)).is_err());
    // A plain background has no objects.
    let plain = reader.read(&zeros(&[1, 3, 32, 32])).unwrap();
    assert!(plain[0].objects.is_empty());
}
