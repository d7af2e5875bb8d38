//! Text to ids and back; and the tokenizer rebuilt from GGUF metadata, exactly or not at all.
//!
//! Tokenizers of directories in Hugging Face's layout come complete and are read in `hf`.
//!
//! Two kinds exist in the files of our families: byte-level BPE with merges in the file (`gpt2`), told apart by how text is
//! split before merging, and SentencePiece-like BPE whose merges are rebuilt from scores (`llama`). A kind that we do not
//! know is an error: a tokenizer that is almost right gives plausible and wrong results.
//!
//! Text of users never yields ids of special tokens; only a chat template's own text may.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    SplitDelimiterBehavior, Token, TokenizerImpl,
};

use super::error::ModelError;
use super::gguf::{Gguf, GgufError, Metadata, Value};
use crate::cache::Span;

/// `tokenizer.ggml.token_type` of tokens that text can become.
const NORMAL: i64 = 1;
/// Of the token for what the vocabulary lacks. Our own text may spell it; as it is not a role, a user's text may become it.
const UNKNOWN: i64 = 2;
/// Of tokens with a meaning beyond text: begin, end, roles.
const CONTROL: i64 = 3;
/// Of tokens that are matched in text before anything else.
const USER_DEFINED: i64 = 4;

/// Splitting of Qwen 2 and later: digits one by one. From the models' own tokenizer files.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Splitting of Llama 3: digits by threes. From the models' own tokenizer files.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A longer token is refused: every place where it might be split is looked at.
const TOKEN_BYTES_MAX: usize = 1024;
/// Merges rebuilt from scores may take so many times the bytes of the tokens; in Gemma 3 they take twice as many.
const MERGE_FACTOR: usize = 16;

/// What SentencePiece writes for a space.
const SPACE_MARK: &str = "\u{2581}";

/// Text to ids and back, for one model.
#[derive(Debug)]
pub struct Tokenizer {
    /// Matches special tokens in text: for the template's own words.
    pub(super) with_specials: Engine,
    /// Treats their spelling as plain text.
    pub(super) plain: Engine,
    pub(super) specials: BTreeSet<u32>,
    pub(super) special_texts: Vec<String>,
    pub(super) tokens: usize,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) ends: BTreeSet<u32>,
    pub(super) add_bos: bool,
    pub(super) template: Option<String>,
}

/// A tokenizer could not be built from a file's metadata.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl Tokenizer {
    /// The tokenizer of a GGUF file; its tensors are not looked at. Takes seconds for a vocabulary of 262144.
    ///
    /// # Errors
    /// What is wrong with the file, by name.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let in_file = |source: GgufError| ModelError::Gguf { path: path.to_path_buf(), source };
        let gguf = Gguf::open(path).map_err(in_file)?;
        Self::from_metadata(&gguf.metadata).map_err(|error| match error {
            BuildError::Gguf(source) => in_file(source),
            BuildError::Model(error) => error,
        })
    }

    /// Rebuilds the tokenizer that the metadata describes. Takes seconds for a vocabulary of 262144.
    pub(crate) fn from_metadata(metadata: &Metadata) -> Result<Self, BuildError> {
        let tokens = metadata.required("tokenizer.ggml.tokens", metadata.texts("tokenizer.ggml.tokens")?)?;
        let types = types(metadata, tokens.len())?;
        if let Some(token) = tokens.iter().find(|token| token.len() > TOKEN_BYTES_MAX) {
            let what = format!("a token is {} bytes long, at most {TOKEN_BYTES_MAX} are possible", token.len());
            return Err(ModelError::Tokenizer { what }.into());
        }
        let model = metadata.required("tokenizer.ggml.model", metadata.text("tokenizer.ggml.model")?)?;
        let mut tokenizer = match model {
            "gpt2" => byte_level(metadata, tokens)?,
            "llama" => sentence_piece(metadata, tokens, &types)?,
            other => {
                let (key, value) = ("tokenizer.ggml.model", other.to_owned());
                return Err(ModelError::UnknownTokenizer { key, value, known: "gpt2, llama" }.into());
            }
        };
        let of_type = |wanted: &'static [i64]| {
            tokens.iter().zip(&types).filter(move |(_, kind)| wanted.contains(kind)).map(|(token, _)| token)
        };
        let special_texts: Vec<String> = of_type(&[UNKNOWN, CONTROL]).cloned().collect();
        let added = |texts: &mut dyn Iterator<Item = &String>, special| {
            texts.map(|text| AddedToken::from(text.clone(), special).normalized(false)).collect::<Vec<_>>()
        };
        tokenizer.add_tokens(added(&mut of_type(&[USER_DEFINED]), false)).map_err(failed)?;
        tokenizer.add_special_tokens(added(&mut of_type(&[UNKNOWN, CONTROL]), true)).map_err(failed)?;
        let (with_specials, plain) = pair(tokenizer)?;
        let bos = id(metadata, "tokenizer.ggml.bos_token_id", tokens.len())?;
        let eos = id(metadata, "tokenizer.ggml.eos_token_id", tokens.len())?;
        let end_of_turn = id(metadata, "tokenizer.ggml.eot_token_id", tokens.len())?;
        let ids = (0_u32..).zip(&types).filter(|(_, kind)| **kind == CONTROL).map(|(id, _)| id);
        Ok(Self {
            with_specials,
            plain,
            specials: ids.collect(),
            special_texts,
            tokens: tokens.len(),
            bos,
            eos,
            ends: eos.into_iter().chain(end_of_turn).collect(),
            // llama.cpp's default where the key is absent: SentencePiece models begin with BOS.
            add_bos: metadata.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(model == "llama") && bos.is_some(),
            template: metadata.text("tokenizer.chat_template")?.map(str::to_owned),
        })
    }

    /// Ids of a user's text: no BOS, no special tokens, whatever the text spells.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the library fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let ids = self.plain.encode(text, false).map_err(failed)?.get_ids().to_vec();
        match ids.iter().find(|id| self.specials.contains(id)) {
            None => Ok(ids),
            Some(id) => Err(ModelError::Tokenizer { what: format!("plain text became the special token {id}") }),
        }
    }

    /// Ids of a text that starts a sequence: as [`Tokenizer::encode`], after BOS where the model wants one.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_start(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut ids: Vec<u32> = self.bos.filter(|_| self.add_bos).into_iter().collect();
        ids.extend(self.encode(text)?);
        Ok(ids)
    }

    /// As [`Tokenizer::encode_start`], with where each token stands in `text`: [begin, end) in bytes, equal for BOS. A token
    /// that is only a part of a character has the whole character.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_spans(&self, text: &str) -> Result<(Vec<u32>, Vec<Span>), ModelError> {
        let encoding = self.plain.encode(text, false).map_err(failed)?;
        let ids = self.encode_start(text)?;
        let before = ids.len() - encoding.len();
        let spans = encoding.get_offsets().iter().map(|offsets| span(*offsets));
        Ok((ids, std::iter::repeat_n((0, 0), before).chain(spans).collect()))
    }

    /// As [`Tokenizer::encode_with_specials`], with where each token stands in `text`.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the library fails.
    pub(crate) fn encode_special_spans(&self, text: &str) -> Result<(Vec<u32>, Vec<Span>), ModelError> {
        let encoding = self.with_specials.encode(text, false).map_err(failed)?;
        let spans = encoding.get_offsets().iter().map(|offsets| span(*offsets)).collect();
        Ok((encoding.get_ids().to_vec(), spans))
    }

    /// Ids of a text in which special tokens count as such: only for text that we wrote, never a user's.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the library fails.
    pub fn encode_with_specials(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        Ok(self.with_specials.encode(text, false).map_err(failed)?.get_ids().to_vec())
    }

    /// The text of these ids, special tokens left out.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the library fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        self.plain.decode(ids, true).map_err(failed)
    }

    /// The token that begins a sequence, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// True if sequences of this model begin with [`Tokenizer::bos`].
    pub fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// The token that ends a sequence, if the model has one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// True for tokens after which nothing more is generated.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// True for tokens that no user's text may become.
    pub fn is_special(&self, id: u32) -> bool {
        self.specials.contains(&id)
    }

    /// Number of tokens.
    pub fn size(&self) -> usize {
        self.tokens
    }

    /// The model's chat template, if it has one.
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// How a token is spelt in the file; empty for an id that does not exist.
    pub(crate) fn spelling(&self, id: Option<u32>) -> String {
        id.and_then(|id| self.with_specials.id_to_token(id)).unwrap_or_default()
    }

    /// Special tokens of a text of our own: id, begin and end in bytes.
    pub(crate) fn special_places(&self, text: &str) -> Result<Vec<(u32, usize, usize)>, ModelError> {
        let encoding = self.with_specials.encode(text, false).map_err(failed)?;
        let places = encoding.get_ids().iter().zip(encoding.get_offsets());
        let added = self.with_specials.get_added_vocabulary().get_added_tokens_decoder();
        let special = places.filter(|(id, _)| added.get(id).is_some_and(|token| token.special));
        Ok(special.map(|(id, (begin, end))| (*id, *begin, *end)).collect())
    }

    /// True if `text` spells a special token.
    pub(crate) fn spells_special(&self, text: &str) -> bool {
        self.special_texts.iter().any(|special| text.contains(special.as_str()))
    }
}

/// A tokenizer of the library whose vocabulary is shared with another: that of Gemma takes 70 MB.
pub(super) type Engine =
    TokenizerImpl<Shared, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Vocabulary and merges.
#[derive(Debug, Clone)]
pub(super) struct Shared(Arc<ModelWrapper>);

impl tokenizers::Model for Shared {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        self.0.tokenize(sequence)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }

    fn get_trainer(&self) -> TrainerWrapper {
        self.0.get_trainer()
    }
}

/// Two of the same: one that matches special tokens in text, and one that takes their spelling as plain text.
pub(super) fn pair(whole: tokenizers::Tokenizer) -> Result<(Engine, Engine), ModelError> {
    let (normalizer, splitter) = (whole.get_normalizer().cloned(), whole.get_pre_tokenizer().cloned());
    let (after, decoder) = (whole.get_post_processor().cloned(), whole.get_decoder().cloned());
    let added = whole.get_added_tokens_decoder();
    let mut ids: Vec<_> = added.keys().copied().collect();
    ids.sort_unstable();
    // In the order of their ids, so that those outside the vocabulary get the same ones again.
    let added: Vec<_> = ids.into_iter().map(|id| added[&id].clone()).collect();
    let model = Shared(Arc::new(whole.get_model().clone()));
    drop(whole);
    let mut with_specials = Engine::new(model);
    with_specials.with_normalizer(normalizer).map_err(failed)?;
    with_specials.with_pre_tokenizer(splitter).with_post_processor(after).with_decoder(decoder);
    // One by one: the library puts special tokens of a list before the others.
    for token in added {
        match token.special {
            true => with_specials.add_special_tokens([token]),
            false => with_specials.add_tokens([token]),
        }
        .map_err(failed)?;
    }
    let mut plain = with_specials.clone();
    plain.set_encode_special_tokens(true);
    Ok((with_specials, plain))
}

fn span((begin, end): (usize, usize)) -> Span {
    let place = |at: usize| u32::try_from(at).expect("texts are shorter than 4 GiB");
    (place(begin), place(end))
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn failed(error: tokenizers::Error) -> ModelError {
    ModelError::Tokenizer { what: error.to_string() }
}

fn types(metadata: &Metadata, count: usize) -> Result<Vec<i64>, GgufError> {
    let key = "tokenizer.ggml.token_type";
    match metadata.0.get(key) {
        None => Ok(vec![NORMAL; count]),
        Some(Value::Integers(types)) if types.len() == count => Ok(types.clone()),
        Some(Value::Bytes(types)) if types.len() == count => Ok(types.iter().map(|kind| i64::from(*kind)).collect()),
        Some(_) => Err(GgufError::KeyType { key: key.to_owned(), expected: "one integer for each token" }),
    }
}

fn id(metadata: &Metadata, key: &str, count: usize) -> Result<Option<u32>, GgufError> {
    match metadata.integer(key)? {
        None => Ok(None),
        Some(id) if id < count => Ok(u32::try_from(id).ok()),
        Some(_) => Err(GgufError::KeyType { key: key.to_owned(), expected: "the id of a token" }),
    }
}

fn vocabulary(tokens: &[String]) -> Vocab {
    tokens.iter().cloned().zip(0_u32..).collect()
}

/// Byte-level BPE: merges from the file, split by the rule that `tokenizer.ggml.pre` names.
fn byte_level(metadata: &Metadata, tokens: &[String]) -> Result<tokenizers::Tokenizer, BuildError> {
    let lines = metadata.required("tokenizer.ggml.merges", metadata.texts("tokenizer.ggml.merges")?)?;
    let wrong = || GgufError::KeyType {
        key: "tokenizer.ggml.merges".to_owned(),
        expected: "pairs of tokens separated by one space",
    };
    let pair = |line: &String| line.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()));
    let merges: Merges = lines.iter().map(|line| pair(line).ok_or_else(wrong)).collect::<Result<_, _>>()?;

    let pre = metadata.required("tokenizer.ggml.pre", metadata.text("tokenizer.ggml.pre")?)?;
    let bytes = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, true, use_regex));
    let split = |pattern: &str| {
        Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
            .map(PreTokenizerWrapper::from)
            .map_err(failed)
    };
    let (steps, whole_words) = match pre {
        "smollm" => (vec![PreTokenizerWrapper::from(Digits::new(true)), bytes(true)], false),
        "qwen2" => (vec![split(QWEN2_SPLIT)?, bytes(false)], false),
        "llama-bpe" | "llama3" => (vec![split(LLAMA3_SPLIT)?, bytes(false)], true),
        other => {
            let (key, value) = ("tokenizer.ggml.pre", other.to_owned());
            let known = "smollm, qwen2, llama-bpe, llama3";
            return Err(ModelError::UnknownTokenizer { key, value, known }.into());
        }
    };
    let bpe = BPE::builder().vocab_and_merges(vocabulary(tokens), merges).ignore_merges(whole_words).build();
    let mut tokenizer = tokenizers::Tokenizer::new(bpe.map_err(failed)?);
    if pre == "qwen2" {
        tokenizer.with_normalizer(Some(NormalizerWrapper::from(NFC))).map_err(failed)?;
    }
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::from(PreTokenizers::new(steps))));
    tokenizer.with_decoder(Some(DecoderWrapper::from(ByteLevel::new(false, true, true))));
    Ok(tokenizer)
}

/// SentencePiece-like BPE: merges rebuilt from scores, bytes for what the vocabulary lacks.
fn sentence_piece(metadata: &Metadata, tokens: &[String], types: &[i64]) -> Result<tokenizers::Tokenizer, BuildError> {
    let pre = metadata.text("tokenizer.ggml.pre")?.unwrap_or("default");
    if pre != "default" {
        let (key, value) = ("tokenizer.ggml.pre", pre.to_owned());
        return Err(ModelError::UnknownTokenizer { key, value, known: "default" }.into());
    }
    let wrong =
        || GgufError::KeyType { key: "tokenizer.ggml.scores".to_owned(), expected: "one number for each token" };
    let scores = match metadata.0.get("tokenizer.ggml.scores") {
        Some(Value::Floats(scores)) if scores.len() == tokens.len() => scores,
        _ => return Err(wrong().into()),
    };
    let vocabulary = vocabulary(tokens);
    let merges = merges_from_scores(tokens, scores, types, &vocabulary)?;
    let mut builder = BPE::builder().vocab_and_merges(vocabulary, merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = id(metadata, "tokenizer.ggml.unknown_token_id", tokens.len())? {
        builder = builder.unk_token(tokens[unknown as usize].clone());
    }
    let mut tokenizer = tokenizers::Tokenizer::new(builder.build().map_err(failed)?);
    let prefix_space = metadata.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spaces = NormalizerWrapper::from(Replace::new(" ", SPACE_MARK).map_err(failed)?);
    let mut steps = vec![spaces];
    let mut decoders = vec![
        DecoderWrapper::from(Replace::new(SPACE_MARK, " ").map_err(failed)?),
        DecoderWrapper::from(tokenizers::decoders::byte_fallback::ByteFallback::new()),
        DecoderWrapper::from(tokenizers::decoders::fuse::Fuse::new()),
    ];
    if prefix_space {
        steps.insert(0, NormalizerWrapper::from(Prepend::new(SPACE_MARK.to_owned())));
        decoders.push(DecoderWrapper::from(tokenizers::decoders::strip::Strip::new(' ', 1, 0)));
    }
    tokenizer.with_normalizer(Some(NormalizerWrapper::from(Normalizers::new(steps)))).map_err(failed)?;
    let decoder = tokenizers::decoders::sequence::Sequence::new(decoders);
    tokenizer.with_decoder(Some(DecoderWrapper::from(decoder)));
    Ok(tokenizer)
}

/// Every way to put a normal token together from two tokens, best score first, then by id, then by where it is split.
fn merges_from_scores(
    tokens: &[String],
    scores: &[f64],
    types: &[i64],
    vocabulary: &Vocab,
) -> Result<Merges, ModelError> {
    let mut order: Vec<usize> = (0..tokens.len()).filter(|id| types[*id] == NORMAL).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    let mut left_bytes = MERGE_FACTOR * tokens.iter().map(String::len).sum::<usize>();
    let mut merges = Merges::new();
    for id in order {
        let token = &tokens[id];
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if vocabulary.contains_key(left) && vocabulary.contains_key(right) {
                left_bytes = left_bytes.checked_sub(token.len()).ok_or_else(|| ModelError::Tokenizer {
                    what: format!("its merges take more than {MERGE_FACTOR} times the bytes of its tokens"),
                })?;
                merges.push((left.to_owned(), right.to_owned()));
            }
        }
    }
    Ok(merges)
}
