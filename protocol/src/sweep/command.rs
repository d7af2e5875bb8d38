//! Kinds `command` and `no-op`.
//!
//! ```toml
//! [[experiment]]
//! kind = "command"
//! argv = ["python3", "train.py", "--lr", "{lr}"]   # {name}: a parameter of the matrix
//! memory = "6GB"                                   # declared peak on its device
//! collect = ["out/*.json", "*.safetensors"]        # become artifacts
//! [experiment.files]                               # written before the start
//! "train.py" = "print('hello')"
//! [experiment.matrix]                              # any name that is no key of the kind is a parameter
//! lr = [0.1, 0.01]
//! ```

use crate::error::SourceError;
use crate::experiment::{CommandSpec, NoOpSpec, ShardSpec};
use crate::limits::COMMAND_FILES_BYTES_MAX;
use crate::size::ByteSize;
use crate::source::TableReader;

/// Prefix of the variables that carry parameters to the program.
pub const PARAMETER_PREFIX: &str = "BONEPILE_PARAM_";

/// Keys of the kind; every other name in its matrix is a parameter.
const KEYS: [&str; 14] = [
    "kind",
    "name",
    "after",
    "require",
    "matrix",
    "argv",
    "env",
    "files",
    "memory",
    "threads",
    "collect",
    "timeout_s",
    "retries",
    "class",
];

/// `argv`, `memory` (default `"0"`: none on a card), `threads` (1–4096, default 1), `env` and `files` (tables of texts),
/// `collect` (patterns), `timeout_s` (0: none), `retries` (0–100, after an exit code that is not 0), `class` (default: the
/// program's name), `work` (units, default 1).
pub(super) fn read(cell: &mut TableReader<'_>) -> Result<ShardSpec, SourceError> {
    let mut parameters = Vec::new();
    for key in cell.keys() {
        if !KEYS.contains(&key) && key != "work" {
            let value = cell.plain(key)?.unwrap_or_default();
            parameters.push((key.to_owned(), value));
        }
    }
    let argv = cell.required::<Vec<String>>("argv")?;
    let Some(program) = argv.first().filter(|program| !program.is_empty()) else {
        return Err(cell.complain("argv", "the list is empty; the first text is the program"));
    };
    let class = match cell.optional::<String>("class")? {
        Some(class) => class,
        None => program.rsplit('/').next().unwrap_or(program).to_owned(),
    };
    let mut filled = Vec::with_capacity(argv.len());
    for text in &argv {
        filled.push(fill(text, &parameters).map_err(|name| {
            cell.complain("argv", format!("`{{{name}}}` names no parameter of the matrix"))
                .hint("write {{ and }} for braces that are meant as such")
        })?);
    }
    let mut env = texts(cell, "env")?;
    env.extend(parameters.iter().map(|(name, value)| (variable(name), value.clone())));
    let files = texts(cell, "files")?;
    if files.iter().map(|(name, text)| name.len() + text.len()).sum::<usize>() > COMMAND_FILES_BYTES_MAX {
        return Err(cell
            .complain("files", format!("more than {COMMAND_FILES_BYTES_MAX} bytes of files"))
            .hint("put large inputs where every worker can read them"));
    }
    if let Some((bad, _)) = files.iter().find(|(name, _)| !is_relative(name)) {
        return Err(cell.complain("files", format!("`{bad}` is not a relative path without ..")));
    }
    let collect = cell.optional::<Vec<String>>("collect")?.unwrap_or_default();
    if let Some(bad) = collect.iter().find(|pattern| !is_relative(pattern)) {
        return Err(cell.complain("collect", format!("`{bad}` is not a relative pattern without ..")));
    }
    let memory = cell.optional::<ByteSize>("memory")?;
    Ok(ShardSpec::Command(Box::new(CommandSpec {
        argv: filled,
        env,
        files,
        memory_bytes: memory.map_or(0, |size| size.0),
        threads: super::small(cell, "threads", 1, 4096, 1)?,
        collect,
        timeout_ms: cell.number("timeout_s", 0..=31_536_000, Some(0))? * 1000,
        retries: super::small(cell, "retries", 0, 100, 0)?,
        class,
        work: super::small(cell, "work", 1, u32::MAX, 1)?,
    })))
}

/// `shards` (1–100000, default 1).
pub(super) fn read_no_op(cell: &mut TableReader<'_>) -> Result<Vec<ShardSpec>, SourceError> {
    let shards = super::small(cell, "shards", 1, 100_000, 1)?;
    Ok((0..shards).map(|index| ShardSpec::NoOp(NoOpSpec { index })).collect())
}

/// `text` with `{name}` replaced by the parameter's value, `{{` and `}}` by braces; the name if there is none.
fn fill(text: &str, parameters: &[(String, String)]) -> Result<String, String> {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        filled.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        let after = &rest[at + 1..];
        if let Some(after) = after.strip_prefix(brace) {
            filled.push_str(brace);
            rest = after;
            continue;
        }
        let name = if brace == "{" { after.split_once('}').map(|(name, _)| name) } else { None };
        let Some(name) = name else {
            // A lone brace is only text.
            filled.push_str(brace);
            rest = after;
            continue;
        };
        let value = parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        filled.push_str(value.ok_or_else(|| name.to_owned())?);
        rest = &after[name.len() + 1..];
    }
    filled.push_str(rest);
    Ok(filled)
}

fn variable(name: &str) -> String {
    let upper = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    format!("{PARAMETER_PREFIX}{}", upper.collect::<String>())
}

fn texts(cell: &mut TableReader<'_>, key: &'static str) -> Result<Vec<(String, String)>, SourceError> {
    let Some(mut table) = cell.table(key)? else { return Ok(Vec::new()) };
    let mut texts = Vec::new();
    for name in table.keys() {
        let text = table.plain(name)?.unwrap_or_default();
        if name.is_empty() || name.contains(['=', '\0']) || text.contains('\0') {
            return Err(table.complain(name, "a name or a text with `=` in its name or a zero byte"));
        }
        texts.push((name.to_owned(), text));
    }
    Ok(texts)
}

fn is_relative(path: &str) -> bool {
    !path.is_empty() && !path.starts_with('/') && path.split('/').all(|part| !part.is_empty() && part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_put_in_and_braces_stay() {
        let parameters = [("lr".to_owned(), "0.1".to_owned())];
        assert_eq!(fill("--lr={lr} {{x}} }", &parameters), Ok("--lr=0.1 {x} }".to_owned()));
        assert_eq!(fill("{rate}", &parameters), Err("rate".to_owned()));
        assert_eq!(fill("{lr", &parameters), Ok("{lr".to_owned()));
        assert_eq!(variable("batch size"), "BONEPILE_PARAM_BATCH_SIZE");
    }
}
