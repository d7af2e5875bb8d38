//! Throughputs, traces and heaps as people hand them in.

use std::collections::BTreeMap;

use serde_json::Value;

use super::replay::{Job, Kind, Throughputs};

/// Why a text is not what it should be, with its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{place}: {message}")]
pub struct FormatError {
    /// The file, as it was given.
    pub file: String,
    /// Line or key.
    pub place: String,
    /// What is wrong and what was expected.
    pub message: String,
}

/// Throughputs, units of work a second: `{"throughputs": {CLASS: {MODEL: RATE}}}`, or as Gavel publishes them,
/// `{MODEL: {"('CLASS', 1)": {"null": RATE}}}`, of which the rows for one GPU alone are taken.
///
/// # Errors
/// What is wrong first.
pub fn throughputs(file: &str, text: &str) -> Result<Throughputs, FormatError> {
    let error = |place: &str, message: String| FormatError { file: file.to_owned(), place: place.to_owned(), message };
    let value: Value =
        serde_json::from_str(text).map_err(|e| error(&e.line().to_string(), format!("not JSON: {e}")))?;
    let root = value.as_object().ok_or_else(|| error("1", "expected an object".to_owned()))?;
    let mut table = Throughputs::new();
    let mut put = |class: &str, model: &str, rate: &Value| {
        let rate = rate.as_f64().filter(|rate| rate.is_finite() && *rate >= 0.0);
        let rate =
            rate.ok_or_else(|| error(&format!("{class}.{model}"), "expected units a second, 0 or more".to_owned()))?;
        table.entry(class.to_owned()).or_default().insert(model.to_owned(), rate);
        Ok::<_, FormatError>(())
    };
    let object = |place: &str, value: &'_ Value| {
        value.as_object().cloned().ok_or_else(|| error(place, "expected an object".to_owned()))
    };
    match root.get("throughputs") {
        Some(classes) => {
            for (class, row) in object("throughputs", classes)? {
                for (model, rate) in object(&class, &row)? {
                    put(&class, &model, &rate)?;
                }
            }
        }
        None => {
            for (model, jobs) in root {
                for (job, rates) in object(model, jobs)? {
                    let class = job.strip_prefix("('").and_then(|rest| rest.strip_suffix("', 1)"));
                    if let (Some(class), Some(alone)) = (class, rates.get("null")) {
                        put(class, model, alone)?;
                    }
                }
            }
        }
    }
    if table.is_empty() {
        return Err(error("1", "no throughputs; expected {\"throughputs\": {CLASS: {MODEL: RATE}}}".to_owned()));
    }
    Ok(table)
}

/// Devices as `k80:4,p100:4` or with memory `gtx-1080:2:8GB`.
///
/// # Errors
/// What is wrong first.
pub fn devices(text: &str, memory: impl Fn(&str) -> Option<u64>) -> Result<Vec<Kind>, FormatError> {
    let error = |part: &str, message: &str| FormatError {
        file: "--devices".to_owned(),
        place: part.to_owned(),
        message: format!("{message}; expected MODEL:COUNT or MODEL:COUNT:MEMORY"),
    };
    let mut kinds = Vec::new();
    for part in text.split(',').filter(|part| !part.trim().is_empty()) {
        let mut fields = part.trim().split(':');
        let model = fields.next().filter(|model| !model.is_empty()).ok_or_else(|| error(part, "no model"))?;
        let count = fields.next().unwrap_or("1").parse().ok().filter(|count| (1..=10_000).contains(count));
        let count = count.ok_or_else(|| error(part, "the count is not a number from 1 to 10000"))?;
        let memory_bytes = match fields.next() {
            Some(size) => size.parse::<protocol::size::ByteSize>().map_err(|message| error(part, &message))?.0,
            None => memory(model).unwrap_or(u64::MAX / 4),
        };
        kinds.push(Kind { model: model.to_owned(), count, memory_bytes });
    }
    if kinds.is_empty() { Err(error(text, "no devices")) } else { Ok(kinds) }
}

/// A trace: comma-separated with a header line that names the columns. `class` and one of `work` (in the throughputs' units)
/// and `reference_s` (seconds on the reference model) are needed; `arrival_s`, `account`, `priority`, `memory` (declared) and
/// `peak` (really taken) may be there.
///
/// # Errors
/// What is wrong first, with its line.
pub fn trace(file: &str, text: &str, throughputs: &Throughputs, reference: &str) -> Result<Vec<Job>, FormatError> {
    let error = |line: usize, message: String| FormatError { file: file.to_owned(), place: line.to_string(), message };
    let mut lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let (number, header) = lines.next().ok_or_else(|| error(1, "empty; expected a header line".to_owned()))?;
    let names = fields(header);
    const KNOWN: [&str; 8] = ["class", "work", "reference_s", "arrival_s", "account", "priority", "memory", "peak"];
    if let Some(unknown) = names.iter().find(|name| !KNOWN.contains(&name.as_str()) && *name != "job") {
        return Err(error(number, format!("unknown column `{unknown}`; expected some of job, {}", KNOWN.join(", "))));
    }
    let mut jobs = Vec::new();
    for (number, line) in lines {
        let row: BTreeMap<&str, String> = names.iter().map(String::as_str).zip(fields(line)).collect();
        let get = |name: &str| row.get(name).map(|value| value.trim()).filter(|value| !value.is_empty());
        let number_of = |name: &str| match get(name) {
            None => Ok(None),
            Some(value) => value
                .parse::<f64>()
                .ok()
                .filter(|value| value.is_finite() && *value >= 0.0)
                .map(Some)
                .ok_or_else(|| error(number, format!("{name} is `{value}`; expected a number, 0 or more"))),
        };
        let size_of = |name: &str| match get(name) {
            None => Ok(None),
            Some(value) => {
                value.parse::<protocol::size::ByteSize>().map(|size| Some(size.0)).map_err(|m| error(number, m))
            }
        };
        let class = get("class").ok_or_else(|| error(number, "no class".to_owned()))?.to_owned();
        let rates =
            throughputs.get(&class).ok_or_else(|| error(number, format!("class `{class}` has no throughputs")))?;
        let reference_s = match (number_of("reference_s")?, number_of("work")?) {
            (Some(seconds), _) => seconds,
            (None, Some(work)) => {
                let rate = rates.get(reference).copied().filter(|rate| *rate > 0.0);
                work / rate.ok_or_else(|| error(number, format!("class `{class}` has no rate on {reference}")))?
            }
            (None, None) => return Err(error(number, "neither work nor reference_s".to_owned())),
        };
        let memory_bytes = size_of("memory")?.unwrap_or(0);
        jobs.push(Job {
            class,
            reference_s,
            arrival_s: number_of("arrival_s")?.unwrap_or(0.0),
            account: get("account").unwrap_or_default().to_owned(),
            priority: get("priority").map_or(Ok(0), |value| {
                value.parse().map_err(|_| error(number, format!("priority is `{value}`; expected a whole number")))
            })?,
            memory_bytes,
            peak_bytes: size_of("peak")?.unwrap_or(memory_bytes),
        });
    }
    if jobs.is_empty() { Err(error(number, "no jobs under the header".to_owned())) } else { Ok(jobs) }
}

/// Fields of a line: commas between, quotes around what has commas, doubled quotes for a quote.
fn fields(line: &str) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                field.push('"');
                characters.next();
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field).trim().to_owned()),
            other => field.push(other),
        }
    }
    fields.push(field.trim().to_owned());
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = r#"{"throughputs": {"a": {"old": 1.0, "new": 10.0}}}"#;

    #[test]
    fn both_forms_of_throughputs_read() {
        let ours = throughputs("t.json", TABLE).unwrap();
        let gavel = r#"{"old": {"('a', 1)": {"null": 1.0, "('b', 1)": [1, 2]}, "('a', 2)": {"null": 9}}, "new": {"('a', 1)": {"null": 10.0}}}"#;
        assert_eq!(throughputs("g.json", gavel).unwrap(), ours);
        assert_eq!(throughputs("t.json", "{").unwrap_err().to_string().split(':').next(), Some("t.json"));
        let bad = r#"{"throughputs": {"a": {"old": "fast"}}}"#;
        assert_eq!(
            throughputs("t.json", bad).unwrap_err().to_string(),
            "t.json:a.old: expected units a second, 0 or more"
        );
    }

    #[test]
    fn a_trace_reads_and_complains_with_its_line() {
        let table = throughputs("t.json", TABLE).unwrap();
        let jobs = trace("j.csv", "job,class,work,memory\n1,\"a\",50,6GB\n", &table, "new").unwrap();
        assert_eq!((jobs[0].reference_s, jobs[0].memory_bytes), (5.0, 6_000_000_000));
        let complaint = |text: &str| trace("j.csv", text, &table, "new").unwrap_err().to_string();
        assert_eq!(complaint("class,work\nb,1\n"), "j.csv:2: class `b` has no throughputs");
        assert_eq!(complaint("class,work\na,x\n"), "j.csv:2: work is `x`; expected a number, 0 or more");
        assert!(complaint("class,wrk\na,1\n").starts_with("j.csv:1: unknown column `wrk`"));
    }

    #[test]
    fn devices_have_counts_and_perhaps_memory() {
        let kinds = devices("k80:4,gtx-1080:2:8GB", |_| None).unwrap();
        assert_eq!((kinds[0].count, kinds[1].memory_bytes), (4, 8_000_000_000));
        assert!(devices("k80:x", |_| None).unwrap_err().to_string().contains("1 to 10000"));
    }
}
