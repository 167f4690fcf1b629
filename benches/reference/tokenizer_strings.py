"""1,000 short strings that try a byte-level tokenizer, the same on every machine and every Python.

`strings()` returns them. Nothing is downloaded: fixed material is combined by a small generator of our own, because
Python promises no stable stream for `random.choice`.
"""

SEED = 20
COUNT = 1000

LANGUAGES = [
    "The quick brown fox jumps over the lazy dog.", "It's what we'd've said, isn't it? They'll know; I'm sure you're right.",
    "Der Übermut grüßt den größten Fluß.", "Où est passée la garçonnière de l'été dernier ?", "¿Dónde está el niño? ¡Mañana será otro día!",
    "A coração não se engana: amanhã haverá pão.", "Perché l'università è già chiusa?", "Wij vieren ’s avonds het feest van één vriend.",
    "Blåbærsyltetøy på brødskiven, takk.", "Får får får? Nej, får får lamm.", "Yöllä sataa hyvää lunta, älä pelkää.", "Þetta er íslenska, ekki færeyska.",
    "Zażółć gęślą jaźń o świcie.", "Příliš žluťoučký kůň úpěl ďábelské ódy.", "Árvíztűrő tükörfúrógép.", "Țara și orașul își păstrează tăcerea.",
    "Şişli'de çağdaş bir öğretmen ıslık çaldı.", "Съешь же ещё этих мягких булок.", "Їжак їсть ґудзики, але не всі.", "Чудният свят е пълен със звезди.",
    "Љубазни фењерџија чађавог лица.", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.", "Հայոց լեզուն հին է և գեղեցիկ։", "საქართველოს მთები თოვლიანია.",
    "שלום עולם, מה שלומך היום?", "בְּרֵאשִׁית בָּרָא", "مرحبا بالعالم، كيف حالك اليوم؟", "بِسْمِ ٱللَّٰهِ", "سلام دنیا، حال شما چطور است؟", "آپ کیسے ہیں؟ موسم اچھا ہے۔",
    "नमस्ते दुनिया, आप कैसे हैं?", "বাংলা ভাষা খুব মিষ্টি।", "ਪੰਜਾਬੀ ਬੋਲੀ ਸੋਹਣੀ ਹੈ।", "ગુજરાતી ભાષા મીઠી છે.", "தமிழ் மொழி மிகவும் பழமையானது.", "తెలుగు భాష తీయనిది.",
    "ಕನ್ನಡ ನಾಡು ಚೆಲುವಾಗಿದೆ.", "മലയാളം ഒരു ഭാഷയാണ്.", "සිංහල අක්ෂර ලස්සනයි.", "ภาษาไทยไม่มีช่องว่างระหว่างคำ", "ພາສາລາວງາມຫຼາຍ", "ဗမာစာ လှပါတယ်။", "ភាសាខ្មែរ ស្រស់ស្អាត។", "བོད་ཡིག་ནི་མཛེས་པོ།",
    "Tiếng Việt có sáu thanh điệu: ngã, hỏi, nặng.", "今天天气很好，我们去公园吧。", "繁體中文與简体字並存。", "これは日本語の文です。カタカナもある。", "ﾊﾝｶｸｶﾅと全角ＡＢＣ１２３", "한국어 문장입니다. 맞죠?", "ᄒᆞᆫ글 옛말", "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ",
    "አማርኛ ቋንቋ ውብ ነው።", "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ", "ᐃᓄᒃᑎᑐᑦ ᐅᖃᐅᓯᖅ", "Dia duit, a chara. Tá sé fuar inniu.", "Mae'r tywydd yn braf yng Nghymru.", "Kaixo mundua, zer moduz?", "Habari ya dunia, rafiki yangu.", "Saluton, mondo! Ĉu ŝi ĵus ĝojas?",
    "Aloha kākou, ʻo wai kou inoa?", "Ẹ káàárọ̀, báwo ni?", "𐌲𐌿𐍄𐌹𐍃𐌺 𐍂𐌰𐌶𐌳𐌰", "𓀀𓁐𓂀 hieroglyphs", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕞𝕒𝕥𝕙 𝒷𝑜𝓁𝒹", "ⴰⵣⵓⵍ ⴰⵎⴰⴹⴰⵍ",
]

CODE = [
    "def f(x: int) -> int:\n    return x ** 2  # square", "for i in range(10):\n\tprint(f\"{i:>4}\", end='')", "class A(B):\n    __slots__ = ()\n\n    def __init__(self): ...",
    "fn main() {\n    println!(\"{:?}\", vec![1u8; 3]);\n}", "impl<'a, T: ?Sized> Deref for Ref<'a, T> {}", "let x = &mut *p as *const _ as usize;", "#include <stdio.h>\nint main(void){return 0;}",
    "template <typename T> constexpr auto f(T&& t) -> decltype(t);", "#define MAX(a,b) (((a)>(b))?(a):(b))", "const f = async (a) => { await fetch(`/api/${a}?q=1`); };", "if (a === b && c !== d || !e) { return; }",
    "interface P<T extends object = {}> { readonly [k: string]: T }", "<div class=\"a-b\" id='c'>&nbsp;&copy; 2024</div>", "<!-- comment --><br/>", "@media (max-width: 600px) { .a > b { color: #ff00aa; } }",
    "SELECT a, COUNT(*) FROM t WHERE b <> 'x' GROUP BY a HAVING COUNT(*) > 1;", "{\"a\": [1, 2.5, null, true], \"b\": {\"c\": \"\\u00e9\\n\"}}", "key: value\n- item1\n- item2:\n    nested: [1, 2]", "#!/bin/bash\nset -euo pipefail\necho \"${x:-0}\" | grep -v '^$' > /dev/null 2>&1",
    "public static void main(String[] args) throws Exception {}", "func (s *S) Get(ctx context.Context) (int, error) { return 0, nil }", "main = do { xs <- getLine; mapM_ print $ zip [1..] xs }", "(defn f [x] (->> x (map inc) (filter even?)))",
    "\\begin{equation}\\frac{\\partial f}{\\partial x}=\\sum_{i=1}^{n}x_i^2\\end{equation}", "^(?:[a-z0-9]+(?:[._-][a-z0-9]+)*)@\\w+\\.\\w{2,}$", "val x: Option[Int] = Some(1).map(_ + 1)", "puts [1, 2, 3].map { |n| n * 2 }.inspect",
    "<?php echo $a['b'] ?? 'c'; ?>", "x <- c(1, 2, NA); mean(x, na.rm = TRUE)", "MOV EAX, [EBX+4*ECX-0x10]", "git rebase -i HEAD~3 && git push --force-with-lease", "FROM python:3.11-slim\nRUN pip install --no-cache-dir torch==2.11.0", "    \treturn self._x[i, :, ::-1] @ y.T",
    "a+=b-=c*=d/=e%=f<<=1>>=2;", "if __name__ == '__main__':\n        main()", "while(1){;}//////////", "/* ---- */ int32_t x = 0xDEADBEEF, y = 0b1010_1010, z = 1e-10f;", "| a | b |\n|---|:-:|\n| 1 | 2 |", "## Title\n\n* one\n* two\n\n1. first\n2. second", "def test():\r\n\treturn 1\r\n",
]

EMOJI = [
    "😀", "😂🤣", "👍🏽", "👩🏿‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🏴‍☠️", "🇫🇷🇯🇵🇧🇷", "❤️", "❤", "❤️‍🔥", "1️⃣2️⃣#️⃣", "🧑‍🤝‍🧑", "👁️‍🗨️", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "☕︎☕️", "🤦🏻‍♀️", "🐻‍❄️", "💯🔥✨", "🫠🫡", "🥹", "™️©️®️", "↔️➡️", "🀄🃏", "⌚⏰", "👩‍❤️‍💋‍👨",
]

SPACES = [" ", "  ", "   ", "    ", "     ", "        ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", "\r", " \n", "\n ", "\t ", " \t", "\u00a0", "\u2003", "\u2009", "\u202f", "\u3000", "\u200b", "\ufeff",
          "\u2028", "\u2029", "\u0085", "\u000b", "\u000c", "\u1680", "\u180e", "\u205f", "\u001c", "\u001f", " \u00a0 ", "\n\t\n"]

CONTROLS = ["\u0000", "\u0001", "\u0004", "\u0006", "\u0007", "\u0008", "\u0013", "\u0014", "\u0016", "\u001a", "\u001b[31m", "\u001b", "\u001d", "\u007f", "\u0080", "\u009f", "\u00ad", "\u200c", "\u200d", "\u200e", "\u202e", "\u2066", "\ufff9", "\ufffd", "\ufffe", "\uffff", "\ue000", "\U000f0000", "\U0010ffff", "\U0004fffe"]

NUMBERS = ["0", "7", "42", "007", "123", "1234567890", "3.14159", "-273.15", "+1", "1,000,000", "1.000.000,50", "6.022e23", "1e-9", "0xff", "0b1011", "1/2", "50%", "$9.99", "€1.234,56", "£5", "¥100", "2024-02-29", "12:34:56", "31.12.1999", "1st", "2nd", "10th", "v1.2.3-rc4", "192.168.0.1", "::1", "²³", "½", "Ⅷ", "ⅳ", "①②", "٣٤٥", "१२३", "๑๒๓", "１２３", "零一二", "𝟘𝟙𝟚", "൫൧", "১২", "𝍠", "1️", "H₂O", "E=mc²", "10⁻³", "50°C", "3×4=12", "π≈3.14", "१st", "Ⅻ3", "9¾"]

WORDS = ["a", "I", "the", "Hello", "world", "tokenizer", "naïve", "co-operate", "don't", "DON'T", "we'll", "WE'LL", "y'all'd've", "rock'n'roll", "'tis", "O'Neill's", "it’s", "snake_case", "camelCase", "SCREAMING_CASE", "kebab-case", "antidisestablishmentarianism", "Donaudampfschifffahrtsgesellschaft",
         "e\u0301", "Z\u0351\u036b\u0343\u036aa\u0363\u0325l\u0348g\u0353o\u0321", "\u01c6", "\ufb01ne", "stra\u00dfe", "\u212b", "\u2126", "i\u0307", "x\u0302\u0323", "NULL", "None", "true", "lol", "http", "SmolLM2", "GPT-2", "ﷺ", "…", "—", "“quoted”", "«guillemets»", "(parens)", "[x]", "{y}", "!!!", "?!?!", "...", "--", "==", "//", "\\", "\\n", "\"", "'", "`", "~~~", "^_^", "¯\\_(ツ)_/¯", "→", "∑∫√∞", "α+β", "∀x∈ℝ", "█▓▒░", "♠♥♦♣", "☃"]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"]
NEARLY = ["<|im_start|", "|im_end|>", "<|im_start |>", "<|IM_START|>", "< |im_end|>", "<|im_<|im_end|>end|>", "<|endoftext", "<s>", "</s>", "[INST]", "<|eot_id|>", "<pad>", "<unk>", "<empty_output"]

ADDRESSES = ["https://example.com/a/b?c=d&e=%20f#g", "http://user:pass@host.example:8080/", "ftp://files.example.org/~x/", "mailto:someone+tag@sub.example.co.uk", "C:\\Users\\x\\file.txt", "/usr/local/lib/python3.11/site-packages", "file:///tmp/a b.txt", "www.example.net", "https://例え.テスト/パス", "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct", "@user #hashtag $TAG", "s3://bucket/key=1/2.parquet", "data:text/plain;base64,SGVsbG8=", "10.1000/xyz123", "arXiv:1706.03762v7", "urn:uuid:6ba7b810-9dad-11d1-80b4-00c04fd430c8"]

ALPHABETS = ["abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "aeiouáéíóúàèìòùäöüñç", "абвгдежзийклмнопрст", "αβγδεζηθικλμνξοπ", "あいうえおかきくけこ", "アイウエオカキク", "的一是不了人我在有他", "가나다라마바사", "אבגדהוזחט", "ابتثجحخد", "कखगघचछज", "กขคงจฉช", "0123456789", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "٠١٢٣٤", " \t\n", "😀👍🏽‍♀️❤️"]


class Stream:
    """A 64-bit linear congruential generator (Knuth's MMIX constants), high bits only."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % n

    def pick(self, items):
        return items[self.below(len(items))]


def spaced(s):
    """Words, numbers and emoji with odd white space between and around them."""
    parts = [s.pick([WORDS, NUMBERS, WORDS, NUMBERS, EMOJI]) for _ in range(2 + s.below(3))]
    text = s.pick([""] + SPACES)
    for part in parts:
        text += s.pick(part) + s.pick(SPACES)
    return text if s.below(2) else text.rstrip(" ")


def indented_numbers(s):
    """White space straight before digits: where splitting digits first changes the tokens."""
    lines = [s.pick(SPACES) + s.pick(["1", "20", "3.", "4)", "²", "٣"]) + s.pick([" x", "", " one", "\t5"]) for _ in range(2)]
    return s.pick(["", "list:", "a"]) + "".join(lines)


def special_text(s):
    return "".join(s.pick([s.pick(SPECIAL), s.pick(SPECIAL), s.pick(NEARLY), s.pick(["", " ", "\n", "user", "system\n", " hi "])]) for _ in range(3))


def jumble(s):
    """Characters of one to three alphabets in random order."""
    alphabets = [s.pick(ALPHABETS) for _ in range(1 + s.below(3))]
    return "".join(s.pick(s.pick(alphabets)) for _ in range(3 + s.below(22)))


def mixed(s):
    groups = [WORDS, NUMBERS, EMOJI, CONTROLS, ADDRESSES, NEARLY, SPACES]
    return "".join(s.pick(s.pick(groups)) for _ in range(2 + s.below(3)))


def excerpt(s):
    """A piece of a sentence or of code, cut anywhere, perhaps with another beside it."""
    text = s.pick([s.pick(LANGUAGES), s.pick(CODE)])
    start = s.below(max(1, len(text) // 2))
    return text[start:start + 4 + s.below(24)]


def long_runs(s):
    return s.pick(["a", "ab", "ha", "=", "-", " ", "\n", "\t", "0", "9", "é", "字", "😂", "the ", ".", "_", "\u0301", "Aa"]) * (2 + s.below(30))


def strings():
    """The list: fixed material first, then each maker in turn until there are COUNT different strings."""
    s = Stream(SEED)
    out = ["", " ", "\n", "a" * 300, "Lorem" * 40, " " * 100, "\n" * 50, "x" + "\u0301" * 60, "1" * 90, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]
    out += LANGUAGES + CODE + EMOJI + CONTROLS + NUMBERS + ADDRESSES + SPECIAL + NEARLY + SPACES
    makers = [spaced, indented_numbers, special_text, jumble, mixed, excerpt, long_runs, spaced, excerpt, jumble]
    seen = dict.fromkeys(out)
    turn = 0
    while len(seen) < COUNT:
        seen.setdefault(makers[turn % len(makers)](s))
        turn += 1
    return list(seen)[:COUNT]


if __name__ == "__main__":
    made = strings()
    print(len(made), "strings,", sum(len(t.encode()) for t in made), "bytes")
