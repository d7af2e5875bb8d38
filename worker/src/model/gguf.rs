//! The GGUF container: metadata and a directory of tensors, read without trusting a single length in it.
//!
//! Written for this project because candle's reader allocates whatever a header asks for. Every count and length is held
//! against the bytes that are left in the file before anything is reserved, so a header of garbage costs an error and
//! never memory. Does not know what the keys mean (`config`), nor how tensors are laid out (`weights`).
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;

/// Bytes of `GGUF`, read as a little-endian number.
const MAGIC: u32 = 0x4655_4747;
/// Tensors have at most this many axes in ggml.
const AXES_MAX: u32 = 4;
/// Alignment of tensor data where `general.alignment` is absent.
const ALIGNMENT_DEFAULT: u64 = 32;

/// A file could not be read as GGUF.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file could not be opened or read.
    #[error("read the file")]
    Io(#[from] std::io::Error),
    /// The first four bytes are not `GGUF`.
    #[error("not a GGUF file: it starts with {magic:#010x}")]
    NotGguf {
        /// The four bytes, as a little-endian number.
        magic: u32,
    },
    /// A version whose layout we do not know.
    #[error("GGUF version {version} is not supported, only 2 and 3")]
    Version {
        /// As written in the file.
        version: u32,
    },
    /// Something claims to be longer than what is left of the file: truncated, or damaged.
    #[error("truncated or corrupt: {what} needs {need} bytes, {left} are left")]
    Truncated {
        /// What was being read.
        what: String,
        /// Bytes it would take.
        need: u64,
        /// Bytes there are.
        left: u64,
    },
    /// A value outside what the format allows.
    #[error("corrupt: {what}")]
    Corrupt {
        /// What is wrong, with the value.
        what: String,
    },
    /// A tensor in an encoding that cannot be dequantised here.
    #[error("tensor {tensor} has type code {code}, which is not supported")]
    TensorType {
        /// Its name.
        tensor: String,
        /// ggml's number for the type.
        code: u32,
    },
    /// A key that must be there is not.
    #[error("metadata key {key} is missing")]
    MissingKey {
        /// Its full name.
        key: String,
    },
    /// A key holds something else than it should.
    #[error("metadata key {key} should be {expected}")]
    KeyType {
        /// Its full name.
        key: String,
        /// What it should be.
        expected: &'static str,
    },
}

/// A metadata value. Numbers are widened; what a key means decides whether the value is acceptable.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    U64(u64),
    /// Any signed integer.
    I64(i64),
    /// f32 and f64.
    F64(f64),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Array of one-byte numbers or booleans, as they lie in the file: there may be as many as the file has bytes.
    Bytes(Vec<u8>),
    /// Array of any other integers.
    Integers(Vec<i64>),
    /// Array of f32 or f64.
    Floats(Vec<f64>),
    /// Array of strings.
    Texts(Vec<String>),
}

/// Where a tensor lies and what it holds.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Row-major shape, outermost axis first (GGUF stores it reversed).
    pub shape: Vec<usize>,
    /// How values are encoded.
    pub dtype: GgmlDType,
    /// From the start of the file, in bytes.
    pub offset: u64,
    /// Length of the encoded values, in bytes.
    pub bytes: usize,
}

/// An opened GGUF file: everything but the tensors' values is in memory.
#[derive(Debug)]
pub struct Gguf {
    /// The file's metadata.
    pub metadata: Metadata,
    /// The directory of tensors.
    pub tensors: BTreeMap<String, TensorInfo>,
    path: PathBuf,
}

impl Gguf {
    /// Reads header and directory of the file at `path`, and checks that every tensor lies inside it.
    ///
    /// # Errors
    /// [`GgufError`]; whatever the header says, memory stays below 8 times the file's size, and mostly below 4.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut reader = Reader { inner: BufReader::new(file), at: 0, length };
        let (metadata, tensors) = reader.header()?;
        Ok(Self { metadata, tensors, path: path.to_path_buf() })
    }

    /// The encoded values of one tensor, as they lie in the file.
    ///
    /// # Errors
    /// [`GgufError::Io`] if the file has changed or vanished since it was opened.
    pub fn bytes_of(&self, info: &TensorInfo) -> Result<Vec<u8>, GgufError> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(info.offset))?;
        let mut bytes = vec![0; info.bytes];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// The key-value part of a header, with typed access.
#[derive(Debug, Clone, Default)]
pub struct Metadata(pub BTreeMap<String, Value>);

impl Metadata {
    /// An integer that is not negative, if the key is there.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] if the key holds something else.
    pub fn integer(&self, key: &str) -> Result<Option<usize>, GgufError> {
        let wrong = || GgufError::KeyType { key: key.to_owned(), expected: "an integer that is not negative" };
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::U64(value)) => usize::try_from(*value).map(Some).map_err(|_| wrong()),
            Some(Value::I64(value)) => usize::try_from(*value).map(Some).map_err(|_| wrong()),
            Some(_) => Err(wrong()),
        }
    }

    /// A finite number, if the key is there.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] if the key holds something else.
    pub fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::F64(value)) if value.is_finite() => Ok(Some(*value)),
            Some(_) => Err(GgufError::KeyType { key: key.to_owned(), expected: "a finite number" }),
        }
    }

    /// A boolean, if the key is there.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] if the key holds something else.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(GgufError::KeyType { key: key.to_owned(), expected: "a boolean" }),
        }
    }

    /// A string, if the key is there.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] if the key holds something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Text(value)) => Ok(Some(value)),
            Some(_) => Err(GgufError::KeyType { key: key.to_owned(), expected: "a string" }),
        }
    }

    /// An array of strings, if the key is there.
    ///
    /// # Errors
    /// [`GgufError::KeyType`] if the key holds something else.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Texts(values)) => Ok(Some(values)),
            Some(_) => Err(GgufError::KeyType { key: key.to_owned(), expected: "an array of strings" }),
        }
    }

    /// Turns an absent value into the error that names its key.
    ///
    /// # Errors
    /// [`GgufError::MissingKey`].
    pub fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, GgufError> {
        value.ok_or_else(|| GgufError::MissingKey { key: key.to_owned() })
    }
}

type Directory = BTreeMap<String, TensorInfo>;

/// Reads forward and knows how much is left.
struct Reader<R> {
    inner: R,
    at: u64,
    length: u64,
}

impl<R: Read> Reader<R> {
    fn header(&mut self) -> Result<(Metadata, Directory), GgufError> {
        let magic = self.u32("the magic number")?;
        if magic != MAGIC {
            return Err(GgufError::NotGguf { magic });
        }
        let version = self.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version { version });
        }
        let tensors = self.u64("the number of tensors")?;
        let keys = self.u64("the number of keys")?;
        // The shortest key takes 8 + 4 + 1 bytes, the shortest tensor 8 + 4 + 8 + 4 + 8.
        self.room("metadata", keys, 13)?;
        self.room("the directory of tensors", tensors, 32)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let key = self.string("a key")?;
            let code = self.u32(&key)?;
            let value = self.value(&key, code)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(corrupt(format!("key {key} occurs twice")));
            }
        }
        let metadata = Metadata(metadata);
        let directory = self.directory(tensors, &metadata)?;
        Ok((metadata, directory))
    }

    fn directory(&mut self, count: u64, metadata: &Metadata) -> Result<Directory, GgufError> {
        let mut entries = Vec::new();
        for _ in 0..count {
            let name = self.string("a tensor's name")?;
            let axes = self.u32(&name)?;
            if axes > AXES_MAX {
                return Err(corrupt(format!("tensor {name} has {axes} axes, at most {AXES_MAX} are possible")));
            }
            let mut shape = Vec::new();
            for _ in 0..axes {
                shape.push(self.u64(&name)?);
            }
            shape.reverse();
            let code = self.u32(&name)?;
            let dtype = dtype(code).ok_or_else(|| GgufError::TensorType { tensor: name.clone(), code })?;
            entries.push((name.clone(), shape, dtype, self.u64(&name)?));
        }
        let alignment = match metadata.integer("general.alignment")? {
            None => ALIGNMENT_DEFAULT,
            Some(value) if value.is_power_of_two() && value <= 1 << 20 => value as u64,
            Some(value) => return Err(corrupt(format!("general.alignment is {value}"))),
        };
        let start = self.at.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, shape, dtype, offset) in entries {
            if !offset.is_multiple_of(alignment) {
                let what = format!("tensor {name} has offset {offset}, not a multiple of the alignment {alignment}");
                return Err(corrupt(what));
            }
            let info = self.place(&name, &shape, dtype, start, offset)?;
            if tensors.contains_key(&name) {
                return Err(corrupt(format!("tensor {name} occurs twice")));
            }
            tensors.insert(name, info);
        }
        refuse_overlap(&tensors)?;
        Ok(tensors)
    }

    /// Checks one directory entry against the file's length.
    fn place(
        &self,
        name: &str,
        shape: &[u64],
        dtype: GgmlDType,
        start: u64,
        offset: u64,
    ) -> Result<TensorInfo, GgufError> {
        let too_big = || corrupt(format!("tensor {name} has shape {shape:?}, more than a file can hold"));
        let block = dtype.block_size() as u64;
        let row = shape.last().copied().unwrap_or(1);
        if row % block != 0 {
            return Err(corrupt(format!("tensor {name} has rows of {row}, not a multiple of the block size {block}")));
        }
        let elements = shape.iter().try_fold(1_u64, |product, axis| product.checked_mul(*axis)).ok_or_else(too_big)?;
        let bytes = (elements / block).checked_mul(dtype.type_size() as u64).ok_or_else(too_big)?;
        let begin = start.checked_add(offset).ok_or_else(too_big)?;
        let left = self.length.saturating_sub(begin);
        if bytes > left {
            return Err(GgufError::Truncated { what: format!("tensor {name}"), need: bytes, left });
        }
        let narrow = |value: u64| usize::try_from(value).map_err(|_| too_big());
        let shape = shape.iter().map(|axis| narrow(*axis)).collect::<Result<_, _>>()?;
        Ok(TensorInfo { shape, dtype, offset: begin, bytes: narrow(bytes)? })
    }

    fn value(&mut self, key: &str, code: u32) -> Result<Value, GgufError> {
        Ok(match code {
            0 | 2 | 4 | 10 => Value::U64(self.unsigned(key, code)?),
            1 | 3 | 5 | 11 => Value::I64(self.signed(key, code)?),
            6 | 12 => Value::F64(self.float(key, code)?),
            7 => Value::Bool(self.boolean(key)?),
            8 => Value::Text(self.string(key)?),
            9 => self.array(key)?,
            _ => return Err(corrupt(format!("key {key} has value type {code}, which GGUF does not define"))),
        })
    }

    fn array(&mut self, key: &str) -> Result<Value, GgufError> {
        let code = self.u32(key)?;
        let count = self.u64(key)?;
        let width = match code {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            _ => return Err(corrupt(format!("key {key} is an array of value type {code}"))),
        };
        self.room(key, count, width)?;
        // `room` has bounded the count by the file's size, so room for all of them can be made at once.
        let room = usize::try_from(count).map_err(|_| corrupt(format!("key {key} is an array of {count}")))?;
        Ok(match code {
            0 | 1 => Value::Bytes(self.bytes(room)?),
            7 => {
                let flags = self.bytes(room)?;
                match flags.iter().find(|flag| **flag > 1) {
                    None => Value::Bytes(flags),
                    Some(other) => return Err(corrupt(format!("{key} should be booleans and holds {other}"))),
                }
            }
            6 | 12 => Value::Floats(self.elements(room, |reader| reader.float(key, code))?),
            8 => Value::Texts(self.elements(room, |reader| reader.string(key))?),
            3 | 5 | 11 => Value::Integers(self.elements(room, |reader| reader.signed(key, code))?),
            _ => Value::Integers(self.elements(room, |reader| {
                let value = reader.unsigned(key, code)?;
                i64::try_from(value).map_err(|_| corrupt(format!("key {key} holds {value}, beyond 63 bits")))
            })?),
        })
    }

    /// `count` things one after the other; the caller has checked that the file has room for them.
    fn elements<T>(
        &mut self,
        count: usize,
        one: impl Fn(&mut Self) -> Result<T, GgufError>,
    ) -> Result<Vec<T>, GgufError> {
        let mut elements = Vec::with_capacity(count);
        for _ in 0..count {
            elements.push(one(self)?);
        }
        Ok(elements)
    }

    /// The next bytes; the caller has checked that they are there.
    fn bytes(&mut self, count: usize) -> Result<Vec<u8>, GgufError> {
        let mut bytes = vec![0; count];
        self.inner.read_exact(&mut bytes)?;
        self.at += count as u64;
        Ok(bytes)
    }

    fn unsigned(&mut self, what: &str, code: u32) -> Result<u64, GgufError> {
        Ok(match code {
            0 => u64::from(self.take::<1>(what)?[0]),
            2 => u64::from(u16::from_le_bytes(self.take(what)?)),
            4 => u64::from(self.u32(what)?),
            _ => self.u64(what)?,
        })
    }

    fn signed(&mut self, what: &str, code: u32) -> Result<i64, GgufError> {
        Ok(match code {
            1 => i64::from(i8::from_le_bytes(self.take(what)?)),
            3 => i64::from(i16::from_le_bytes(self.take(what)?)),
            5 => i64::from(i32::from_le_bytes(self.take(what)?)),
            _ => i64::from_le_bytes(self.take(what)?),
        })
    }

    fn float(&mut self, what: &str, code: u32) -> Result<f64, GgufError> {
        if code == 6 {
            Ok(f64::from(f32::from_le_bytes(self.take(what)?)))
        } else {
            Ok(f64::from_le_bytes(self.take(what)?))
        }
    }

    fn boolean(&mut self, what: &str) -> Result<bool, GgufError> {
        match self.take::<1>(what)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(corrupt(format!("{what} should be a boolean and is {other}"))),
        }
    }

    fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let length = self.u64(what)?;
        self.room(what, length, 1)?;
        // `room` has bounded the length by the file's size.
        let count = usize::try_from(length).map_err(|_| corrupt(format!("{what} is {length} bytes long")))?;
        let bytes = self.bytes(count)?;
        String::from_utf8(bytes).map_err(|_| corrupt(format!("{what} is not UTF-8")))
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.take(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.take(what)?))
    }

    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        self.room(what, 1, N as u64)?;
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    /// Refuses `count` things of at least `width` bytes that the rest of the file cannot hold.
    fn room(&self, what: &str, count: u64, width: u64) -> Result<(), GgufError> {
        let left = self.length.saturating_sub(self.at);
        let need = count.saturating_mul(width);
        if need > left {
            return Err(GgufError::Truncated { what: what.to_owned(), need, left });
        }
        Ok(())
    }
}

fn corrupt(what: String) -> GgufError {
    GgufError::Corrupt { what }
}

/// Bytes that two tensors share would count twice: a small file could ask for the memory of a large one.
fn refuse_overlap(tensors: &Directory) -> Result<(), GgufError> {
    let mut places: Vec<(u64, u64, &str)> = tensors
        .iter()
        .filter(|(_, info)| info.bytes > 0)
        .map(|(name, info)| (info.offset, info.offset + info.bytes as u64, name.as_str()))
        .collect();
    places.sort_unstable();
    match places.iter().zip(places.iter().skip(1)).find(|((_, end, _), (begin, _, _))| begin < end) {
        None => Ok(()),
        Some(((_, _, first), (_, _, second))) => Err(corrupt(format!("tensors {first} and {second} overlap"))),
    }
}

/// ggml's type numbers, as far as candle can dequantise them.
fn dtype(code: u32) -> Option<GgmlDType> {
    Some(match code {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}
