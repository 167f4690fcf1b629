//! What is said of a picture: captions of scenes, and captions read.
//!
//! ```text
//! caption    := opener? (object position? | object relation object | object "and" object) background?
//! opener     := "a picture of" | "an image of" | "there is"
//! object     := ("a" | "an") size? fill? colour shape ("with stripes")?
//! position   := "on the left" | …        relation := "left of" | …        background := "on a white background" | …
//! ```

use controlgen_core::noise::Stream;
use controlgen_core::{Error, Result, edit_distance};

use super::scene::{Background, Color, Fill, Object, Position, Scene, Shape, Size, held_out, pick};

/// What captions may begin with.
const OPENERS: &[&str] = &["a picture of", "an image of", "there is"];

/// What captions may say of a striped object behind its shape.
const STRIPES: &str = "with stripes";

/// The words that are no attribute's.
const OTHERS: &str = "a an with stripes and on background";

impl Position {
    /// What captions say of the only object there.
    fn phrases(self) -> &'static [&'static str] {
        match self {
            Self::Left => &["on the left", "at the left"],
            Self::Right => &["on the right", "at the right"],
            Self::Top => &["at the top", "on top"],
            Self::Bottom => &["at the bottom", "below"],
            Self::Center => &["in the middle", "in the center"],
        }
    }

    /// What captions say between the object there and the other one.
    fn relations(self) -> &'static [&'static str] {
        match self {
            Self::Left => &["left of", "to the left of"],
            Self::Right => &["right of", "to the right of"],
            Self::Top => &["above", "over"],
            Self::Bottom => &["below", "under"],
            Self::Center => &[],
        }
    }
}

/// All words of captions, in alphabetical order.
pub fn words() -> Vec<&'static str> {
    let mut words: Vec<&str> = OTHERS.split(' ').collect();
    let mut add = |phrases: &[&'static str]| words.extend(phrases.iter().flat_map(|p| p.split(' ')));
    add(OPENERS);
    Background::ALL.iter().for_each(|value| add(value.words()));
    Color::ALL.iter().for_each(|value| add(value.words()));
    Shape::ALL.iter().for_each(|value| add(value.words()));
    Size::ALL.iter().for_each(|value| add(value.words()));
    Fill::ALL.iter().for_each(|value| add(value.words()));
    Position::ALL.iter().for_each(|value| add(value.phrases()));
    Position::ALL.iter().for_each(|value| add(value.relations()));
    words.sort_unstable();
    words.dedup();
    words
}

/// What a caption says of one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamedObject {
    /// Its outline.
    pub shape: Shape,
    /// Its colour.
    pub color: Color,
    /// How large it is, if that is said.
    pub size: Option<Size>,
    /// What it is filled with: of which nothing is said is solid.
    pub fill: Fill,
}

/// What a caption says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The objects, as the caption names them: one or two.
    pub objects: Vec<NamedObject>,
    /// Where the first object lies, in the picture or beside the second, if that is said.
    pub position: Option<Position>,
    /// What is behind the objects, if that is said.
    pub background: Option<Background>,
}

/// A caption and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caption {
    /// Lower-case words by single spaces.
    pub text: String,
    /// What it says.
    pub named: Named,
}

impl Caption {
    /// Draws a caption of a scene of one or two objects. Synonyms are equally likely; sizes, backgrounds and positions of a
    /// single object are said in 65 %, relations in 80 %, an opener in 40 %, that a fill is solid in 25 %.
    pub fn of(scene: &Scene, stream: &mut Stream) -> Self {
        let mut text: Vec<&str> = Vec::new();
        if stream.uniform() < 0.4 {
            text.push(pick(stream, OPENERS));
        }
        let positions = scene.positions();
        let mut named = Named { objects: Vec::new(), position: None, background: None };
        for (k, object) in scene.objects.iter().enumerate() {
            if k > 0 {
                named.position = positions.first().copied().filter(|_| stream.uniform() < 0.8);
                text.push(named.position.map_or("and", |position| pick(stream, position.relations())));
            }
            named.objects.push(say(object, &mut text, stream));
        }
        if let ([_], [position]) = (&scene.objects[..], &positions[..])
            && stream.uniform() < 0.65
        {
            named.position = Some(*position);
            text.push(pick(stream, position.phrases()));
        }
        if stream.uniform() < 0.65 {
            named.background = Some(scene.background);
            let word = pick(stream, scene.background.words());
            text.extend(pick(stream, &[&["on a", word, "background"][..], &["on", word]]));
        }
        Self { text: text.join(" "), named }
    }
}

/// Says an object.
fn say(object: &Object, text: &mut Vec<&str>, stream: &mut Stream) -> NamedObject {
    let article = text.len();
    let size = Some(object.size).filter(|_| stream.uniform() < 0.65);
    text.extend(size.map(|size| pick(stream, size.words())));
    let behind = object.fill == Fill::Striped && stream.uniform() < 0.25;
    if !behind && (object.fill == Fill::Striped || stream.uniform() < 0.25) {
        text.push(pick(stream, object.fill.words()));
    }
    text.push(pick(stream, object.color.words()));
    text.push(pick(stream, object.shape.words()));
    if behind {
        text.push(STRIPES);
    }
    text.insert(article, if text[article].starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" });
    NamedObject { shape: object.shape, color: object.color, size, fill: object.fill }
}

impl Named {
    /// Reads a caption. Capitals and the number of spaces do not matter, nor does which article is used.
    ///
    /// # Errors
    /// [`Error::Value`] for unknown words, with the nearest known word of each, and for known words in an order that is no
    /// caption's.
    pub fn parse(text: &str) -> Result<Self> {
        let lower = text.to_lowercase();
        let found: Vec<&str> = lower.split_whitespace().collect();
        let known = words();
        let mut unknown: Vec<&str> = found.iter().copied().filter(|word| !known.contains(word)).collect();
        unknown.dedup();
        if !unknown.is_empty() {
            let each = unknown.iter().map(|word| format!("`{word}` (nearest: {})", nearest(word, &known)));
            let found = each.collect::<Vec<_>>().join(", ");
            return Err(Error::value("caption", "words that captions of shapes have", found));
        }
        Reader { words: &found, at: 0 }.caption()
    }

    /// Whether no model is trained on objects of these colours and shapes, in this order.
    pub fn held_out(&self) -> bool {
        let objects: Vec<_> = self.objects.iter().map(|object| (object.color, object.shape)).collect();
        held_out(&objects)
    }
}

/// Words, read from the left.
struct Reader<'a> {
    words: &'a [&'a str],
    at: usize,
}

impl Reader<'_> {
    fn caption(mut self) -> Result<Named> {
        let _ = OPENERS.iter().any(|opener| self.eat(opener));
        let mut objects = vec![self.object()?];
        let before = self.at;
        let relation = self.one_of(Position::ALL, Position::relations);
        let mut position = None;
        if self.next_is_article() && relation.is_some() {
            objects.push(self.object()?);
            position = relation;
        } else {
            // `below` may also say where a single object is.
            self.at = before;
            if self.eat("and") {
                objects.push(self.object()?);
            } else {
                position = self.one_of(Position::ALL, Position::phrases);
            }
        }
        let mut background = None;
        if self.eat("on") {
            let article = self.article();
            background = self.one_of(Background::ALL, Background::words);
            if background.is_none() {
                return Err(self.expected("a background: white, gray, black or brown"));
            }
            if article && !self.eat("background") {
                return Err(self.expected("`background`"));
            }
        }
        if self.at < self.words.len() {
            let expected = match (position, background) {
                (_, Some(_)) => "no more words",
                (None, None) if objects.len() == 1 => {
                    "a position, a relation, `and`, a background, or no more words"
                }
                _ => "a background, or no more words",
            };
            return Err(self.expected(expected));
        }
        Ok(Named { objects, position, background })
    }

    fn object(&mut self) -> Result<NamedObject> {
        if !self.article() {
            return Err(self.expected("`a` or `an`"));
        }
        let size = self.one_of(Size::ALL, Size::words);
        let fill = self.one_of(Fill::ALL, Fill::words);
        let color = self.one_of(Color::ALL, Color::words);
        let color = color.ok_or_else(|| self.expected("a colour"))?;
        let shape = self.one_of(Shape::ALL, Shape::words);
        let shape = shape.ok_or_else(|| self.expected("a shape"))?;
        let stripes = self.eat(STRIPES);
        if stripes && fill == Some(Fill::Solid) {
            return Err(Error::value("caption", "an object that is solid or striped", "one that is both"));
        }
        let fill = if stripes { Fill::Striped } else { fill.unwrap_or(Fill::Solid) };
        Ok(NamedObject { shape, color, size, fill })
    }

    /// Reads a phrase, if it comes next.
    fn eat(&mut self, phrase: &str) -> bool {
        let length = phrase.split(' ').count();
        let next = self.words.get(self.at..self.at + length);
        let found = next.is_some_and(|next| phrase.split(' ').eq(next.iter().copied()));
        if found {
            self.at += length;
        }
        found
    }

    /// Reads a phrase of one of the values.
    fn one_of<T: Copy>(&mut self, values: &[T], phrases: impl Fn(T) -> &'static [&'static str]) -> Option<T> {
        values.iter().copied().find(|&value| phrases(value).iter().any(|phrase| self.eat(phrase)))
    }

    fn article(&mut self) -> bool {
        self.eat("a") || self.eat("an")
    }

    fn next_is_article(&self) -> bool {
        matches!(self.words.get(self.at), Some(&("a" | "an")))
    }

    fn expected(&self, what: &str) -> Error {
        let place = format!("after \"{}\"", self.words[..self.at].join(" "));
        let found = self.words.get(self.at).map_or("nothing more".to_owned(), |word| format!("`{word}`"));
        Error::value("caption", what, format!("{found} {place}"))
    }
}

/// The known word that is nearest, the first of several.
fn nearest<'a>(word: &str, known: &[&'a str]) -> &'a str {
    known.iter().copied().min_by_key(|other| edit_distance(word, other)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use controlgen_core::noise::Noise;

    use super::*;
    use crate::shapes::scene::Split;

    #[test]
    fn captions_say_what_they_name() {
        let mut stream = Noise::seeded(5).stream(0);
        let (mut longest, mut said) = (0, [0; 4]);
        for _ in 0..4000 {
            let scene = Scene::sample(&mut stream, Split::Training);
            let Caption { text, named } = Caption::of(&scene, &mut stream);
            assert_eq!(Named::parse(&text).unwrap(), named, "{text}");
            longest = longest.max(text.split(' ').count());
            assert_eq!(named.objects.len(), scene.objects.len());
            for (named, object) in named.objects.iter().zip(&scene.objects) {
                assert_eq!((named.shape, named.color), (object.shape, object.color), "{text}");
                assert_eq!(named.fill, object.fill, "{text}");
                assert!(named.size.is_none_or(|size| size == object.size), "{text}");
            }
            assert!(named.background.is_none_or(|background| background == scene.background), "{text}");
            assert!(named.position.is_none_or(|position| position == scene.positions()[0]), "{text}");
            said[0] += usize::from(named.background.is_some());
            said[1] += usize::from(named.objects[0].size.is_some());
            said[named.objects.len() + 1] += usize::from(named.position.is_some());
        }
        // 65 % of 4,000, of 4,000, of 1,600, and 80 % of 2,400, within five standard deviations.
        let expected = [(2600, 151), (2600, 151), (1040, 185), (1920, 185)];
        for (said, (mean, far)) in said.into_iter().zip(expected) {
            assert!(said.abs_diff(mean) <= far, "{said}, not {mean} ± {far}");
        }
        assert!(longest < 30, "{longest} words");
    }

    #[test]
    fn captions_of_others_are_read() {
        let circle = NamedObject { shape: Shape::Circle, color: Color::Red, size: None, fill: Fill::Solid };
        let read = |text: &str| Named::parse(text).unwrap();
        let one = |position, background| Named { objects: vec![circle], position, background };
        assert_eq!(read("A red  circle"), one(None, None));
        assert_eq!(read("a red circle below"), one(Some(Position::Bottom), None));
        assert_eq!(
            read("there is a red disc on top on grey"),
            one(Some(Position::Top), Some(Background::Gray))
        );
        assert_eq!(read("a red circle below on a black background").position, Some(Position::Bottom));
        let star = NamedObject { shape: Shape::Star, color: Color::Purple, ..circle };
        let star = NamedObject { size: Some(Size::Large), fill: Fill::Striped, ..star };
        let two = read("a red circle below a huge violet star with stripes on white");
        assert_eq!(two.objects, [circle, star]);
        assert_eq!((two.position, two.background), (Some(Position::Bottom), Some(Background::White)));
        assert_eq!(read("a red circle and a big striped purple star").objects, [circle, star]);
    }

    #[test]
    fn words_that_are_unknown_or_misplaced_are_named() {
        let refused = |text: &str, said: &[&str]| {
            let message = Named::parse(text).unwrap_err().to_string();
            assert!(said.iter().all(|part| message.contains(part)), "{text}: {message}");
        };
        refused("a purpel hexagon on the left", &["`purpel` (nearest: purple)", "`hexagon` (nearest: "]);
        refused("a red circle.", &["`circle.` (nearest: circle)"]);
        refused("", &["`a` or `an`", "nothing more"]);
        refused("a circle", &["a colour", "`circle` after \"a\""]);
        refused("a red", &["a shape", "nothing more after \"a red\""]);
        refused("a red circle above", &["a position, a relation", "`above`"]);
        refused("a red circle on a white", &["`background`", "nothing more"]);
        refused("a red circle on the", &["a background", "`the`"]);
        refused("a red circle and a blue star on the left", &["a background", "`the`"]);
        refused("a solid red circle with stripes", &["solid or striped"]);
        refused("a red circle on white on black", &["no more words", "`on`"]);
    }

    #[test]
    fn the_nearest_word_is_found() {
        assert_eq!(nearest("trangle", &words()), "triangle");
    }
}
