//! Model files that lie: headers with sizes, offsets, counts, names and types that cannot be, written by hand and by chance.
//! Each is an error or a model; none is a panic, and none costs memory that the file's own size does not account for.
//! `PROPTEST_CASES=20000` looks for longer.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::sample::{Index, select};
use worker::model::gguf::Gguf;
use worker::model::hf::Checkpoint;
use worker::model::{LoadOptions, Model, Precision, Tokenizer};

use crate::allocator::{Usage, measure};
use crate::tiny::{FAMILIES, Tiny};

/// What reading a header may take in all, in sizes of the file: each short string, key and name gets an owner.
const HEADER_FACTOR: usize = 8;
/// What one request may take: numbers are widened to 8 bytes, of which a file has at least 2, and strings have 24 for 8.
const REQUEST_FACTOR: usize = 4;
/// A buffer to read through.
const HEADER_CONSTANT: usize = 64 << 10;
/// What a load may take beyond what the undamaged file takes: settings of at most 1024 layers, twice, while errors are told.
const LOAD_EXTRA: usize = 16 << 20;

/// The words of an error and its sources.
fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words.push_str(": ");
        words.push_str(&error.to_string());
        source = error.source();
    }
    words
}

fn within(usage: Usage, file: usize, what: &str) {
    let limit = HEADER_FACTOR * file + HEADER_CONSTANT;
    assert!(usage.peak <= limit, "{what}: {usage:?} for a file of {file} bytes");
    assert!(usage.largest <= REQUEST_FACTOR * file + HEADER_CONSTANT, "{what}: {usage:?} for a file of {file} bytes");
}

/// A file of its own in a directory of its own.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// Loads what may be damaged; a model that loads must also run, or refuse to.
fn load(path: &Path, precision: Precision) -> Usage {
    let options = LoadOptions { precision, ..LoadOptions::default() };
    let (loaded, usage) = measure(|| Model::load(path, &options));
    if let Ok(model) = loaded {
        let _ = model.start().and_then(|mut context| model.prefill(&mut context, &[1, 2, 3]));
        let _ = model.tokenizer().encode("a b");
    }
    usage
}

/// A GGUF file put together by hand.
#[derive(Clone)]
struct Raw {
    version: u32,
    tensor_count: u64,
    key_count: u64,
    keys: Vec<u8>,
    tensors: Vec<u8>,
    data: Vec<u8>,
}

impl Raw {
    fn new() -> Self {
        Self { version: 3, tensor_count: 0, key_count: 0, keys: Vec::new(), tensors: Vec::new(), data: vec![0; 256] }
    }

    /// A key whose value is of type `code` and has these bytes.
    fn key(mut self, name: &str, code: u32, value: &[u8]) -> Self {
        self.key_count += 1;
        self.keys.extend(text(name));
        self.keys.extend(code.to_le_bytes());
        self.keys.extend(value);
        self
    }

    fn tensor(mut self, name: &str, axes: &[u64], code: u32, offset: u64) -> Self {
        self.tensor_count += 1;
        self.tensors.extend(text(name));
        self.tensors.extend(u32::try_from(axes.len()).unwrap().to_le_bytes());
        self.tensors.extend(axes.iter().flat_map(|axis| axis.to_le_bytes()));
        self.tensors.extend(code.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.tensor_count.to_le_bytes());
        bytes.extend(self.key_count.to_le_bytes());
        bytes.extend(&self.keys);
        bytes.extend(&self.tensors);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }
}

fn text(words: &str) -> Vec<u8> {
    [&(words.len() as u64).to_le_bytes(), words.as_bytes()].concat()
}

/// An array's bytes: type of its elements, how many it says it has, and what it has.
fn array(code: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [code.to_le_bytes().as_slice(), &count.to_le_bytes(), elements].concat()
}

#[test]
fn gguf_headers_that_cannot_be_are_refused_by_name() {
    const HUGE: u64 = 1 << 60;
    let f32s = |offset| Raw::new().tensor("a", &[4], 0, offset);
    let cases = [
        ("version 1", Raw::new().with(|raw| raw.version = 1), "version 1"),
        ("big-endian", Raw::new().with(|raw| raw.version = 3_u32.swap_bytes()), "version 50331648"),
        ("tensors without end", Raw::new().with(|raw| raw.tensor_count = u64::MAX), "the directory of tensors"),
        ("keys without end", Raw::new().with(|raw| raw.key_count = u64::MAX), "metadata"),
        ("more tensors than there are", Raw::new().with(|raw| raw.tensor_count = 5), ""),
        ("more keys than there are", Raw::new().with(|raw| raw.key_count = 9), ""),
        ("a long name", Raw::new().with(|raw| (raw.keys, raw.key_count) = (vec![255; 40], 1)), "a key"),
        (
            "a name that is not text",
            Raw::new().with(|raw| {
                raw.keys = [&3_u64.to_le_bytes()[..], &[0xff, 0xfe, 0xfd], &[0; 8]].concat();
                raw.key_count = 1;
            }),
            "not UTF-8",
        ),
        ("a key twice", Raw::new().key("k", 0, &[1]).key("k", 0, &[1]), "occurs twice"),
        ("no such type", Raw::new().key("k", 13, &[0; 8]), "value type 13"),
        ("a boolean of 2", Raw::new().key("k", 7, &[2]), "boolean"),
        ("a long string", Raw::new().key("k", 8, &HUGE.to_le_bytes()), "needs"),
        ("an array of arrays", Raw::new().key("k", 9, &array(9, 1, &array(0, 1, &[1]))), "array of value type 9"),
        ("an array of what", Raw::new().key("k", 9, &array(77, 1, &[0; 8])), "array of value type 77"),
        ("a long array of bytes", Raw::new().key("k", 9, &array(0, HUGE, &[0; 8])), "needs"),
        ("a long array of words", Raw::new().key("k", 9, &array(10, u64::MAX, &[0; 8])), "needs"),
        ("a long array of strings", Raw::new().key("k", 9, &array(8, u64::MAX / 8, &[0; 8])), "needs"),
        ("beyond 63 bits", Raw::new().key("k", 9, &array(10, 1, &[255; 8])), "beyond 63 bits"),
        ("alignment 0", f32s(0).key("general.alignment", 4, &[0; 4]), "general.alignment is 0"),
        ("alignment 3", f32s(0).key("general.alignment", 4, &[3, 0, 0, 0]), "general.alignment is 3"),
        ("alignment in words", f32s(0).key("general.alignment", 8, &text("32")), "general.alignment"),
        ("alignment of gigabytes", f32s(0).key("general.alignment", 4, &[0, 0, 0, 0x80]), "general.alignment"),
        ("a tensor twice", f32s(0).tensor("a", &[4], 0, 32), "occurs twice"),
        ("tensors in each other", f32s(0).tensor("b", &[40], 0, 0), "overlap"),
        ("tensors that overlap by a little", Raw::new().tensor("a", &[9], 0, 0).tensor("b", &[4], 0, 32), "overlap"),
        ("an offset between places", f32s(4), "offset"),
        ("an offset beyond the file", f32s(1 << 40), "needs"),
        ("an offset that wraps", f32s(u64::MAX - 31), "more than a file can hold"),
        ("a tensor past the end", Raw::new().tensor("a", &[65], 0, 0), "needs"),
        ("five axes", Raw::new().tensor("a", &[1; 5], 0, 0), "5 axes"),
        ("four axes of 2^16", Raw::new().tensor("a", &[1 << 16; 4], 0, 0), "more than a file can hold"),
        ("an axis of 2^64 - 1", Raw::new().tensor("a", &[u64::MAX], 0, 0), ""),
        ("an axis of 2^62", Raw::new().tensor("a", &[1 << 62], 0, 0), "more than a file can hold"),
        ("rows that are no blocks", Raw::new().tensor("a", &[31], 2, 0), "multiple of the block size"),
        ("no such tensor type", Raw::new().tensor("a", &[32], 4, 0), "type code 4"),
        ("a name without end", Raw::new().with(|raw| (raw.tensors, raw.tensor_count) = (vec![255; 40], 1)), "name"),
    ];
    let place = Place::new();
    for (what, raw, message) in cases {
        let bytes = raw.bytes();
        let path = place.write("case.gguf", &bytes);
        let (opened, usage) = measure(|| Gguf::open(&path));
        let words = chain(&opened.expect_err(what));
        assert!(words.contains(message), "{what}: {words}");
        within(usage, bytes.len(), what);
    }
    let whole = Raw::new().key("k", 4, &[1, 0, 0, 0]).tensor("a", &[8], 0, 0).tensor("b", &[0, 4], 0, 32).tensor(
        "c",
        &[],
        0,
        32,
    );
    Gguf::open(&place.write("whole.gguf", &whole.bytes())).unwrap();
}

/// Arrays and names by the million take memory in proportion to the file, whatever their kind.
#[test]
fn long_gguf_headers_cost_what_the_file_costs() {
    const COUNT: usize = 400_000;
    let number = COUNT as u64;
    let letters: Vec<u8> = (0..COUNT).flat_map(|_| text("ab")).collect();
    let many = (0..COUNT / 20).fold(Raw::new(), |raw, at| raw.key(&format!("key.{at:012}"), 4, &[1; 4]));
    let tensors = (0..COUNT / 20).fold(Raw::new(), |raw, at| raw.tensor(&format!("tensor.{at:012}"), &[0], 0, 0));
    let cases = [
        ("bytes", Raw::new().key("k", 9, &array(0, number, &vec![1; COUNT]))),
        ("booleans", Raw::new().key("k", 9, &array(7, number, &vec![1; COUNT]))),
        ("half words", Raw::new().key("k", 9, &array(2, number, &vec![1; 2 * COUNT]))),
        ("words", Raw::new().key("k", 9, &array(5, number, &vec![1; 4 * COUNT]))),
        ("floats", Raw::new().key("k", 9, &array(6, number, &vec![1; 4 * COUNT]))),
        ("strings", Raw::new().key("k", 9, &array(8, number, &letters))),
        ("empty strings", Raw::new().key("k", 9, &array(8, number, &vec![0; 8 * COUNT]))),
        ("keys", many),
        ("tensors", tensors),
    ];
    let place = Place::new();
    for (what, raw) in cases {
        let bytes = raw.bytes();
        let path = place.write("long.gguf", &bytes);
        let (opened, usage) = measure(|| Gguf::open(&path));
        opened.unwrap();
        let [peak, largest] = [usage.peak, usage.largest].map(|taken| taken as f64 / bytes.len() as f64);
        eprintln!("{what}: a file of {} bytes takes {peak:.2} times that, at most {largest:.2} at once", bytes.len());
        within(usage, bytes.len(), what);
    }
}

/// Vocabularies whose merges would take far more time or memory than the file: they are rebuilt from scores.
#[test]
fn vocabularies_cost_what_the_file_costs() {
    let vocabulary = |tokens: &[String]| {
        let (count, zeros) = (tokens.len() as u64, vec![0; 4 * tokens.len()]);
        let spelt: Vec<u8> = tokens.iter().flat_map(|token| text(token)).collect();
        Raw::new()
            .key("tokenizer.ggml.model", 8, &text("llama"))
            .key("tokenizer.ggml.tokens", 9, &array(8, count, &spelt))
            .key("tokenizer.ggml.scores", 9, &array(6, count, &zeros))
    };
    let powers = |letter: &str, most: usize| (1..=most).map(move |length| letter.repeat(length)).collect::<Vec<_>>();
    let place = Place::new();
    for (what, tokens, message) in [
        ("one long token", vec!["a".to_owned(), "a".repeat(1 << 20)], "1048576 bytes long"),
        ("every power", powers("a", 700), "merges"),
        ("some powers", powers("a", 20), ""),
        ("nothing", Vec::new(), ""),
    ] {
        let bytes = vocabulary(&tokens).bytes();
        let path = place.write("vocabulary.gguf", &bytes);
        let (opened, usage) = measure(|| Tokenizer::open(&path));
        assert_eq!(opened.as_ref().is_ok(), message.is_empty(), "{what}: {opened:?}");
        let words = opened.err().map(|error| chain(&error)).unwrap_or_default();
        assert!(words.contains(message), "{what}: {words}");
        assert!(usage.peak <= 32 * bytes.len() + LOAD_EXTRA / 16, "{what}: {usage:?} for {} bytes", bytes.len());
    }
}

/// One safetensors file of this header and so many bytes.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn safetensors_headers_that_cannot_be_are_refused_by_name() {
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        safetensors(&format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#), 64)
    };
    let two = |first: &str, second: &str| {
        let one =
            |name: &str, offsets: &str| format!(r#""{name}":{{"dtype":"F32","shape":[8],"data_offsets":{offsets}}}"#);
        safetensors(&format!("{{{},{}}}", one("a", first), one("b", second)), 64)
    };
    let two_names = safetensors(&format!("{{{0},{0}}}", r#""a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#), 0);
    let cases = [
        ("nothing", Vec::new(), "asks for 8 bytes"),
        ("seven bytes", vec![0; 7], "asks for 8 bytes"),
        ("a header of nothing", vec![0; 8], ""),
        ("a header without end", vec![255; 16], "asks for"),
        ("a header of 2^40 bytes", [&(1_u64 << 40).to_le_bytes()[..], &[b' '; 64]].concat(), "asks for"),
        ("one byte too few", [&9_u64.to_le_bytes()[..], b"{}      "].concat(), "asks for"),
        ("not JSON", safetensors("{", 0), "EOF"),
        ("not text", [&4_u64.to_le_bytes()[..], &[0xff; 4]].concat(), "safetensors"),
        ("a list", safetensors("[1]", 0), "safetensors"),
        ("depths", safetensors(&"[".repeat(100_000), 0), ""),
        ("deep in a tensor", safetensors(&format!("{{\"a\":{}", "{\"a\":".repeat(50_000)), 0), ""),
        ("a tensor twice", two_names, "occurs twice"),
        ("no such type", entry("F33", "[16]", "[0,64]"), "F33"),
        ("a type that weights do not have", entry("I32", "[16]", "[0,64]"), "I32"),
        ("a shape that is too small", entry("F32", "[15]", "[0,64]"), ""),
        ("a shape that is too large", entry("F32", "[4611686018427387904,4]", "[0,64]"), ""),
        ("a shape beyond 64 bits", entry("F32", "[99999999999999999999999]", "[0,64]"), ""),
        ("a negative shape", entry("F32", "[-1]", "[0,64]"), ""),
        ("a shape in halves", entry("F32", "[1.5]", "[0,64]"), ""),
        (
            "a shape that multiplies to nothing",
            entry("F32", "[18446744073709551615,18446744073709551615,0]", "[0,0]"),
            "",
        ),
        ("backwards", entry("F32", "[16]", "[64,0]"), ""),
        ("beyond the file", entry("F32", "[32]", "[0,128]"), "asks for"),
        ("at the end of numbers", entry("F32", "[1]", "[18446744073709551611,18446744073709551615]"), ""),
        ("three offsets", entry("F32", "[16]", "[0,32,64]"), ""),
        ("an offset behind a hole", entry("F32", "[8]", "[32,64]"), ""),
        ("bytes nobody claims", entry("F32", "[8]", "[0,32]"), "asks for"),
        ("tensors in each other", two("[0,32]", "[16,48]"), ""),
        ("two tensors in one place", two("[0,32]", "[0,32]"), ""),
        ("a hole between tensors", two("[0,32]", "[48,80]"), ""),
        ("no offsets", safetensors(r#"{"a":{"dtype":"F32","shape":[0]}}"#, 0), "data_offsets"),
    ];
    for (what, bytes, message) in cases {
        let place = Place::new();
        place.write("model.safetensors", &bytes);
        let (opened, usage) = measure(|| Checkpoint::open(place.0.path()));
        let words = chain(&opened.expect_err(what));
        assert!(words.contains(message), "{what}: {words}");
        within(usage, bytes.len(), what);
    }
}

#[test]
fn long_safetensors_headers_cost_what_the_file_costs() {
    let names = |shape: &str| {
        let entries = (0..20_000)
            .map(|at| format!(r#""tensor.{at:09}.weight":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}"#));
        safetensors(&format!("{{{}}}", entries.collect::<Vec<_>>().join(",")), 0)
    };
    let axes = vec!["0"; 300_000].join(",");
    let one = format!(r#"{{"a":{{"dtype":"F32","shape":[{axes}],"data_offsets":[0,0]}}}}"#);
    for (what, bytes) in [("tensors", names("[0]")), ("axes", safetensors(&one, 0))] {
        let place = Place::new();
        place.write("model.safetensors", &bytes);
        let (opened, usage) = measure(|| Checkpoint::open(place.0.path()));
        let [peak, largest] = [usage.peak, usage.largest].map(|taken| taken as f64 / bytes.len() as f64);
        eprintln!(
            "{what}: {} bytes take {peak:.2} times that, at most {largest:.2} at once: {}",
            bytes.len(),
            opened.is_ok()
        );
        within(usage, bytes.len(), what);
    }
}

/// What an index may say about shards: names that lead elsewhere, and shards that are not there.
#[test]
fn an_index_that_lies_is_refused() {
    for (what, index, message) in [
        ("another directory", r#"{"weight_map":{"a":"../a.safetensors"}}"#, "not a plain file name"),
        ("the root", r#"{"weight_map":{"a":"/etc/passwd"}}"#, "not a plain file name"),
        ("itself", r#"{"weight_map":{"a":"."}}"#, "not a plain file name"),
        ("nothing", r#"{"weight_map":{"a":""}}"#, "not a plain file name"),
        ("no shard", r#"{"weight_map":{"a":"a.safetensors"}}"#, "a.safetensors"),
        ("a number", r#"{"weight_map":{"a":1}}"#, "a string"),
        ("no map", r#"{"metadata":{}}"#, "weight_map"),
        ("a list", "[]", "an object"),
        ("depths", &"[".repeat(10_000), "recursion"),
    ] {
        let place = Place::new();
        place.write("model.safetensors.index.json", index.as_bytes());
        let words = chain(&Checkpoint::open(place.0.path()).expect_err(what));
        assert!(words.contains(message), "{what}: {words}");
    }
}

/// Damage as transport, disks and attackers do it.
#[derive(Debug, Clone)]
enum Damage {
    /// One bit.
    Flip(Index, u8),
    /// A word of 4 or 8 bytes becomes a number that is unlikely to be right.
    Word(Index, u64, bool),
    /// The rest is gone.
    Cut(Index),
    /// A stretch is there twice.
    Twice(Index, u8),
    /// A stretch is gone.
    Gone(Index, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    let numbers = select(vec![
        0,
        1,
        2,
        7,
        33,
        255,
        1024,
        65_535,
        1 << 20,
        1 << 31,
        u64::from(u32::MAX),
        1 << 32,
        1 << 40,
        1 << 62,
        1 << 63,
        u64::MAX - 31,
        u64::MAX,
    ]);
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, bit)| Damage::Flip(at, bit % 8)),
        (any::<Index>(), numbers, any::<bool>()).prop_map(|(at, number, wide)| Damage::Word(at, number, wide)),
        any::<Index>().prop_map(Damage::Cut),
        (any::<Index>(), any::<u8>()).prop_map(|(at, length)| Damage::Twice(at, length)),
        (any::<Index>(), any::<u8>()).prop_map(|(at, length)| Damage::Gone(at, length)),
    ]
}

impl Damage {
    /// Does it to the first `header` bytes; cuts may be anywhere.
    fn apply(&self, bytes: &mut Vec<u8>, header: usize) {
        let header = header.min(bytes.len());
        if header < 9 {
            return;
        }
        match self {
            Self::Flip(at, bit) => bytes[at.index(header)] ^= 1 << bit,
            Self::Word(at, number, wide) => {
                let (at, width) = (at.index(header - 8), if *wide { 8 } else { 4 });
                bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
            }
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Self::Twice(at, length) => {
                let at = at.index(header);
                let end = header.min(at + usize::from(*length));
                let again = bytes[at..end].to_vec();
                bytes.splice(end..end, again);
            }
            Self::Gone(at, length) => {
                let at = at.index(header);
                bytes.drain(at..header.min(at + usize::from(*length)));
            }
        }
    }
}

fn gguf_of(family: &str) -> (Vec<u8>, usize) {
    let tiny = Tiny::new(family);
    let place = Place::new();
    let path = place.0.path().join("tiny.gguf");
    tiny.write(&path);
    let bytes = std::fs::read(path).unwrap();
    let last = tiny.tensors.last().unwrap().0.as_bytes();
    let header = bytes.windows(last.len()).rposition(|window| window == last).unwrap() + last.len() + 40;
    (bytes, header)
}

fn tiny_directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/tiny").join(name)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_gguf_files_cost_an_error(
        family in select(FAMILIES.to_vec()),
        damages in prop::collection::vec(damage(), 1..4),
        stored in any::<bool>(),
    ) {
        let (mut bytes, header) = gguf_of(family);
        let place = Place::new();
        let precision = if stored { Precision::Stored } else { Precision::F32 };
        let whole = load(&place.write("whole.gguf", &bytes), precision);
        damages.iter().for_each(|damage| damage.apply(&mut bytes, header));
        let path = place.write("damaged.gguf", &bytes);
        let (_, usage) = measure(|| Gguf::open(&path).is_ok());
        within(usage, bytes.len(), "opening");
        let usage = load(&path, precision);
        prop_assert!(usage.peak <= whole.peak + LOAD_EXTRA, "{:?}, undamaged {:?}", usage, whole);
    }

    #[test]
    fn damaged_safetensors_files_cost_an_error(
        name in select(vec!["llama", "llama3", "mistral", "qwen2", "gemma3"]),
        damages in prop::collection::vec(damage(), 1..4),
        stored in any::<bool>(),
    ) {
        let place = Place::new();
        for entry in std::fs::read_dir(tiny_directory(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, place.0.path().join(path.file_name().unwrap())).unwrap();
        }
        let precision = if stored { Precision::Stored } else { Precision::F32 };
        let whole = load(place.0.path(), precision);
        let mut bytes = std::fs::read(tiny_directory(name).join("model.safetensors")).unwrap();
        let header = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        damages.iter().for_each(|damage| damage.apply(&mut bytes, header));
        place.write("model.safetensors", &bytes);
        let usage = load(place.0.path(), precision);
        prop_assert!(usage.peak <= whole.peak + LOAD_EXTRA, "{:?}, undamaged {:?}", usage, whole);
    }

    /// The small files beside the weights.
    #[test]
    fn damaged_settings_cost_an_error(
        name in select(vec!["llama", "llama3", "mistral", "qwen2", "gemma3"]),
        file in select(vec!["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]),
        damages in prop::collection::vec(damage(), 1..3),
        digit in prop::option::of((any::<Index>(), 0..10_u8)),
    ) {
        let place = Place::new();
        for entry in std::fs::read_dir(tiny_directory(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, place.0.path().join(path.file_name().unwrap())).unwrap();
        }
        let mut bytes = std::fs::read(tiny_directory(name).join(file)).unwrap();
        let whole = load(place.0.path(), Precision::F32);
        match digit {
            // Another digit keeps the document a document, and asks for another size.
            Some((at, digit)) => {
                let digits: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at].is_ascii_digit()).collect();
                if !digits.is_empty() {
                    bytes[digits[at.index(digits.len())]] = b'0' + digit;
                }
            }
            None => {
                let header = bytes.len();
                damages.iter().for_each(|damage| damage.apply(&mut bytes, header));
            }
        }
        place.write(file, &bytes);
        let usage = load(place.0.path(), Precision::F32);
        prop_assert!(usage.peak <= whole.peak + LOAD_EXTRA, "{:?}, undamaged {:?}", usage, whole);
    }
}
