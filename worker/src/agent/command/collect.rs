//! The files that a program made and its sweep asked for.
//!
//! Patterns are relative paths: `*` and `?` within a name, `**` over any number of directories. Links are not followed, so
//! that nothing outside the seat's directory becomes an artifact.

use std::io;
use std::path::{Path, PathBuf};

use super::output::{OUTPUT_FILE, OUTPUT_NAME};

/// Most files that one seat may hand in: each is a file in the store and a line in a manifest.
pub const FILES_MAX: usize = 10_000;
/// Deepest directory that is looked into.
const DEPTH_MAX: usize = 64;

/// The files could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// More than anyone wants as artifacts.
    #[error("the patterns of `collect` match more than {FILES_MAX} files")]
    TooMany,
    /// A directory does not read.
    #[error("could not look into {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// The plain files below `directory` that match one of `patterns`: (name relative to it, path), sorted by name.
///
/// # Errors
/// [`CollectError`].
pub fn collect(directory: &Path, patterns: &[String]) -> Result<Vec<(String, PathBuf)>, CollectError> {
    let patterns: Vec<Vec<&str>> =
        patterns.iter().map(|pattern| pattern.split('/').filter(|part| *part != ".").collect()).collect();
    let mut found = Vec::new();
    if !patterns.is_empty() {
        walk(directory, &mut Vec::new(), &patterns, &mut found)?;
    }
    found.sort();
    Ok(found)
}

fn walk(
    directory: &Path,
    above: &mut Vec<String>,
    patterns: &[Vec<&str>],
    found: &mut Vec<(String, PathBuf)>,
) -> Result<(), CollectError> {
    let failed = |source| CollectError::Directory { path: directory.to_owned(), source };
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // Names of artifacts are text.
        let Ok(name) = entry.file_name().into_string() else { continue };
        let kind = entry.file_type().map_err(failed)?;
        above.push(name);
        if kind.is_dir() && above.len() < DEPTH_MAX {
            walk(&entry.path(), above, patterns, found)?;
        } else if kind.is_file() && patterns.iter().any(|pattern| matches_path(pattern, above)) {
            let name = above.join("/");
            if found.len() == FILES_MAX {
                return Err(CollectError::TooMany);
            }
            if name != OUTPUT_FILE {
                found.push((artifact_name(name), entry.path()));
            }
        }
        above.pop();
    }
    Ok(())
}

/// One name is taken by what the program wrote to its output.
fn artifact_name(name: String) -> String {
    if name == OUTPUT_NAME { format!("program/{name}") } else { name }
}

fn matches_path(pattern: &[&str], path: &[String]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (Some((&"**", rest)), _) => (0..=path.len()).any(|skipped| matches_path(rest, &path[skipped..])),
        (Some((part, rest)), Some((name, below))) => {
            matches_name(part.as_bytes(), name.as_bytes()) && matches_path(rest, below)
        }
        (None, Some(_)) | (Some(_), None) => false,
    }
}

/// Goes back to the last `*` where it fails, so that its cost is at most the product of both lengths.
fn matches_name(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut place) = (0, 0);
    let mut star = None;
    while place < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, place));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[place] => (at, place) = (at + 1, place + 1),
            _ => match &mut star {
                Some((before, taken)) => {
                    *taken += 1;
                    (at, place) = (*before + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(directory: &Path, patterns: &[&str]) -> Vec<String> {
        let patterns: Vec<_> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        collect(directory, &patterns).unwrap().into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn patterns_mean_what_they_mean_in_a_shell() {
        for (pattern, name, expected) in [
            ("*.json", "a.json", true),
            ("*.json", "a.jsonl", false),
            ("a?c*", "abcdef", true),
            ("*a*b*", "xaxxbx", true),
            ("*a*b", "xaxxbx", false),
            ("", "x", false),
            ("**", "x", true),
        ] {
            assert_eq!(matches_name(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn files_are_found_below_the_directory_and_nowhere_else() {
        let root = tempfile::tempdir().unwrap();
        let seat = root.path().join("seat");
        fs::create_dir_all(seat.join("out/deep/er")).unwrap();
        fs::write(root.path().join("secret.json"), "not yours").unwrap();
        for name in ["a.json", "output.log", OUTPUT_FILE, "out/b.json", "out/deep/c.json", "out/deep/er/d.json"] {
            fs::write(seat.join(name), "{}").unwrap();
        }
        std::os::unix::fs::symlink(root.path().join("secret.json"), seat.join("linked.json")).unwrap();
        std::os::unix::fs::symlink(root.path(), seat.join("above")).unwrap();
        std::os::unix::fs::symlink(".", seat.join("out/loop")).unwrap();
        assert_eq!(names(&seat, &["*.json"]), ["a.json"]);
        assert_eq!(names(&seat, &["out/*.json", "out/b*"]), ["out/b.json"]);
        assert_eq!(names(&seat, &["out/**/*.json"]), ["out/b.json", "out/deep/c.json", "out/deep/er/d.json"]);
        assert_eq!(names(&seat, &["./**/d.json"]), ["out/deep/er/d.json"]);
        assert_eq!(names(&seat, &["above/*"]), [""; 0], "links are not followed");
        assert_eq!(names(&seat, &["*"]), ["a.json", "program/output.log"]);
        assert_eq!(names(&seat, &[]), [""; 0]);
    }

    #[test]
    fn too_many_files_are_told_as_such() {
        let root = tempfile::tempdir().unwrap();
        (0..=FILES_MAX).for_each(|index| fs::write(root.path().join(index.to_string()), "").unwrap());
        let refused = collect(root.path(), &["*".to_owned()]).unwrap_err();
        assert_eq!(refused.to_string(), "the patterns of `collect` match more than 10000 files");
    }
}
