//! What a picture shows: one object or two before a background.

use controlgen_core::noise::Stream;

/// The side of the picture that lengths are measured in, in pixels.
pub const SIDE: i64 = 32;

/// An attribute with few values: an index, a name, and the words that captions have for it, the name first.
macro_rules! attribute {
    ($(#[$doc:meta])* $name:ident { $($value:ident: $($word:literal)|+),+ $(,)? }) => {
        $(#[$doc])*
        #[allow(missing_docs, reason = "the names say it")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($value),+ }

        impl $name {
            /// All values, in the order of their indices.
            pub const ALL: &[Self] = &[$(Self::$value),+];

            /// The words for it, the name first.
            pub fn words(self) -> &'static [&'static str] {
                match self { $(Self::$value => &[$($word),+]),+ }
            }

            /// Its name.
            pub fn name(self) -> &'static str {
                self.words()[0]
            }

            /// Where it stands in [`Self::ALL`].
            pub fn index(self) -> usize {
                self as usize
            }
        }
    };
}

attribute! {
    /// What is behind the objects.
    Background { White: "white", Gray: "gray" | "grey", Black: "black", Brown: "brown" }
}

attribute! {
    /// The colour of an object.
    Color {
        Red: "red",
        Green: "green",
        Blue: "blue",
        Yellow: "yellow",
        Purple: "purple" | "violet",
        Orange: "orange",
        Cyan: "cyan",
        Pink: "pink",
    }
}

attribute! {
    /// The outline of an object.
    Shape {
        Circle: "circle" | "disc",
        Square: "square" | "box",
        Triangle: "triangle",
        Diamond: "diamond" | "rhombus",
        Cross: "cross" | "plus",
        Star: "star",
    }
}

attribute! {
    /// How large an object is.
    Size { Small: "small" | "little" | "tiny", Large: "large" | "big" | "huge" }
}

attribute! {
    /// What an object is filled with: its colour, or horizontal bars of it.
    Fill { Solid: "solid" | "plain", Striped: "striped" }
}

attribute! {
    /// Where an object lies: in the picture, or beside the other object.
    Position { Left: "left", Right: "right", Top: "top", Bottom: "bottom", Center: "center" }
}

impl Background {
    /// Levels of red, green and blue, 0 ..= 255.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::White => [245; 3],
            Self::Gray => [128; 3],
            Self::Black => [15; 3],
            Self::Brown => [105, 70, 40],
        }
    }
}

impl Color {
    /// Levels of red, green and blue, 0 ..= 255.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [215, 40, 40],
            Self::Green => [45, 160, 65],
            Self::Blue => [45, 75, 220],
            Self::Yellow => [240, 215, 50],
            Self::Purple => [140, 55, 180],
            Self::Orange => [240, 140, 35],
            Self::Cyan => [65, 200, 220],
            Self::Pink => [245, 150, 190],
        }
    }
}

/// Levels as pixels in −1 ..= 1.
pub fn pixels(rgb: [u8; 3]) -> [f32; 3] {
    rgb.map(|level| f32::from(level) / 127.5 - 1.0)
}

impl Size {
    /// The radius, in pixels of a 32×32 picture.
    pub fn radius(self) -> f64 {
        match self {
            Self::Small => 4.5,
            Self::Large => 7.0,
        }
    }
}

impl Position {
    /// Where the other object of two lies.
    #[must_use]
    pub fn opposite(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
            Self::Top => Self::Bottom,
            Self::Bottom => Self::Top,
            Self::Center => Self::Center,
        }
    }
}

/// One object of a picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Object {
    /// Its outline.
    pub shape: Shape,
    /// Its colour.
    pub color: Color,
    /// How large it is.
    pub size: Size,
    /// What it is filled with.
    pub fill: Fill,
    /// x to the right and y downwards, in pixels of a 32×32 picture: `[16.0, 16.0]` is the corner between its four
    /// middle pixels.
    pub center: [f64; 2],
}

/// A picture's content.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// What is behind the objects.
    pub background: Background,
    /// The objects, in the order in which captions name them.
    pub objects: Vec<Object>,
}

/// Which scenes are drawn: by the colours and shapes of their objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Those that models are trained on.
    Training,
    /// Those that no model is trained on ([`held_out`]).
    HeldOut,
}

/// Whether no model is trained on objects of these colours and shapes, in this order.
///
/// So it is where (colour + 3 · shape) mod 10 = 7 for one of them, by indices, and for a tenth of the ordered pairs: with
/// k = 48 (6 · colour₁ + shape₁) + 6 · colour₂ + shape₂ those whose upper half of 2654435761 k mod 2³² is a multiple of ten.
pub fn held_out(objects: &[(Color, Shape)]) -> bool {
    let one = |&(color, shape): &(Color, Shape)| (color.index() + 3 * shape.index()) % 10 == 7;
    let pair = |objects: &[(Color, Shape)]| {
        let code = |(color, shape): (Color, Shape)| (6 * color.index() + shape.index()) as u32;
        let hash = (48 * code(objects[0]) + code(objects[1])).wrapping_mul(2_654_435_761);
        (hash >> 16).is_multiple_of(10)
    };
    objects.iter().any(one) || objects.windows(2).any(pair)
}

impl Scene {
    /// Draws a scene: of one object in 40 %, of two in 60 %; all attributes are uniform among those of the split.
    pub fn sample(stream: &mut Stream, split: Split) -> Self {
        if stream.uniform() < 0.4 { Self::single(stream, split) } else { Self::pair(stream, split) }
    }

    /// Draws a scene of one object, somewhere in one of the five zones.
    pub fn single(stream: &mut Stream, split: Split) -> Self {
        let mut objects = drawn(stream, split, 1);
        let near = between(stream, 8, 10);
        let far = between(stream, 22, 24);
        let across = between(stream, 14, 18);
        objects[0].center = match pick(stream, Position::ALL) {
            Position::Left => [near, across],
            Position::Right => [far, across],
            Position::Top => [across, near],
            Position::Bottom => [across, far],
            Position::Center => [between(stream, 15, 17), between(stream, 15, 17)],
        };
        Self { background: pick(stream, Background::ALL), objects }
    }

    /// Draws a scene of two objects, beside each other or one above the other, that differ in shape or colour.
    pub fn pair(stream: &mut Stream, split: Split) -> Self {
        let mut objects = drawn(stream, split, 2);
        let near = [between(stream, 7, 8), between(stream, 13, 19)];
        let far = [between(stream, 24, 25), between(stream, 13, 19)];
        let exchanged = |[x, y]: [f64; 2]| [y, x];
        let vertical = stream.uniform() < 0.5;
        let centers = if vertical { [exchanged(near), exchanged(far)] } else { [near, far] };
        let first_is_far = stream.uniform() < 0.5;
        for (k, object) in objects.iter_mut().enumerate() {
            object.center = centers[k ^ usize::from(first_is_far)];
        }
        Self { background: pick(stream, Background::ALL), objects }
    }

    /// Whether no model is trained on such a scene.
    pub fn held_out(&self) -> bool {
        let objects: Vec<_> = self.objects.iter().map(|object| (object.color, object.shape)).collect();
        held_out(&objects)
    }

    /// Where the objects lie, each: one in the picture, two beside each other. More than two have no positions.
    pub fn positions(&self) -> Vec<Position> {
        positions(&self.objects)
    }
}

/// [`Scene::positions`].
pub fn positions(objects: &[Object]) -> Vec<Position> {
    let middle = SIDE as f64 / 2.0;
    match objects {
        [one] => vec![direction([one.center[0] - middle, one.center[1] - middle], 3.5)],
        [a, b] => {
            let first = direction([a.center[0] - b.center[0], a.center[1] - b.center[1]], 0.0);
            vec![first, first.opposite()]
        }
        _ => Vec::new(),
    }
}

/// Along the longer side, if it is longer than `near`.
fn direction([x, y]: [f64; 2], near: f64) -> Position {
    match (x.abs() >= y.abs(), x, y) {
        _ if x.abs().max(y.abs()) <= near => Position::Center,
        (true, x, _) if x < 0.0 => Position::Left,
        (true, ..) => Position::Right,
        (false, _, y) if y < 0.0 => Position::Top,
        (false, ..) => Position::Bottom,
    }
}

/// So many objects of the split, not yet placed.
fn drawn(stream: &mut Stream, split: Split, count: usize) -> Vec<Object> {
    loop {
        let kinds: Vec<_> =
            (0..count).map(|_| (pick(stream, Color::ALL), pick(stream, Shape::ALL))).collect();
        let same = kinds.windows(2).any(|pair| pair[0] == pair[1]);
        if same || held_out(&kinds) != (split == Split::HeldOut) {
            continue;
        }
        let mut object = |(color, shape)| {
            let (size, fill) = (pick(stream, Size::ALL), pick(stream, Fill::ALL));
            Object { shape, color, size, fill, center: [0.0; 2] }
        };
        return kinds.into_iter().map(&mut object).collect();
    }
}

/// A value, all equally likely. `values` is not empty.
pub fn pick<T: Copy>(stream: &mut Stream, values: &[T]) -> T {
    values[stream.index(values.len())]
}

/// A whole number in `low ..= high`.
fn between(stream: &mut Stream, low: usize, high: usize) -> f64 {
    (low + stream.index(high - low + 1)) as f64
}

#[cfg(test)]
mod tests {
    use controlgen_core::noise::Noise;

    use super::*;

    #[test]
    fn scenes_are_of_their_split_and_within_their_zones() {
        let mut stream = Noise::seeded(3).stream(0);
        let mut singles = 0;
        for k in 0..4000 {
            let split = if k % 2 == 0 { Split::Training } else { Split::HeldOut };
            let scene = Scene::sample(&mut stream, split);
            assert_eq!(scene.held_out(), split == Split::HeldOut, "{scene:?}");
            let inside = |object: &Object| object.center.iter().all(|c| (7.0..=25.0).contains(c));
            assert!(scene.objects.iter().all(inside), "{scene:?}");
            let places = scene.positions();
            match &scene.objects[..] {
                [one] => {
                    singles += 1;
                    let near = one.center.iter().all(|c| (15.0..=17.0).contains(c));
                    assert_eq!(places == [Position::Center], near, "{scene:?}");
                }
                [a, b] => {
                    assert_ne!((a.shape, a.color), (b.shape, b.color));
                    assert_eq!(places[0], places[1].opposite());
                }
                other => panic!("{} objects", other.len()),
            }
        }
        // 40 % of 4,000, within five standard deviations of 31.
        assert!((1445..=1755).contains(&singles), "{singles} of one object");
    }

    /// The figures of a second implementation of the same rules, in Python.
    #[test]
    fn held_out_are_five_of_48_objects_and_a_tenth_of_the_pairs() {
        let all: Vec<(Color, Shape)> = Color::ALL
            .iter()
            .flat_map(|&color| Shape::ALL.iter().map(move |&shape| (color, shape)))
            .collect();
        let single: Vec<_> = all.iter().copied().filter(|&object| held_out(&[object])).collect();
        let expected = [
            (Color::Green, Shape::Triangle),
            (Color::Blue, Shape::Star),
            (Color::Purple, Shape::Square),
            (Color::Orange, Shape::Cross),
            (Color::Pink, Shape::Circle),
        ];
        assert_eq!(single, expected);
        let pairs = all.iter().flat_map(|&a| all.iter().map(move |&b| [a, b]));
        let trained = |&[a, b]: &[(Color, Shape); 2]| a != b && !held_out(&[a]) && !held_out(&[b]);
        let trained: Vec<_> = pairs.filter(trained).collect();
        let held = trained.iter().filter(|pair| held_out(&pair[..])).count();
        assert_eq!((trained.len(), held), (1806, 167));
    }
}
