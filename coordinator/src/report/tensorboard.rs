//! TensorBoard event files: what trainers open. One folder a training, one below it a replica.
//!
//! A file is records of TFRecord: length (u64 LE), masked CRC-32C of it, data, masked CRC-32C of the data. The data is a
//! protobuf `Event` (tensorflow/core/util/event.proto) with scalars as `Summary.Value.simple_value`. The same results give the
//! same bytes: times are those at which shards ended.

use std::collections::BTreeMap;

use protocol::experiment::ShardSpec;
use protocol::experiment::projector::{Stage, TrainSpec};
use protocol::ids::ShardId;
use protocol::results::{LayerGate, ShardResult};
use protocol::time::UnixMillis;

use super::projector::gates_open;
use crate::api::{RunDetail, RunResults};

/// A file below the folder that TensorBoard is pointed at: path and content.
pub type EventFile = (String, Vec<u8>);

/// The event files of a run's trainings; none if it has none.
pub fn event_files(results: &RunResults, detail: &RunDetail) -> Vec<EventFile> {
    let ended: BTreeMap<ShardId, UnixMillis> =
        detail.shards.iter().filter_map(|shard| Some((shard.id, shard.finished_at_ms?))).collect();
    let mut names: Vec<TrainSpec> = Vec::new();
    let mut files: BTreeMap<String, Writer> = BTreeMap::new();
    for shard in &results.shards {
        let ShardSpec::ProjectorTrain(spec) = &shard.spec else { continue };
        let whole = spec.at(Stage::Whole { shards: 0 });
        let place = names.iter().position(|known| *known == whole).unwrap_or_else(|| {
            names.push(whole);
            names.len() - 1
        });
        let at = ended.get(&shard.id).copied().unwrap_or(results.summary.submitted_at_ms);
        for result in shard.seats.iter().filter_map(|seat| seat.result.as_ref()) {
            write(&mut files, &format!("training-{place}"), at, result);
        }
    }
    let stamp = results.summary.submitted_at_ms.0 / 1000;
    let named =
        |(folder, writer): (String, Writer)| (format!("{folder}/events.out.tfevents.{stamp}.bonepile"), writer.bytes);
    files.into_iter().map(named).collect()
}

fn write(files: &mut BTreeMap<String, Writer>, training: &str, at: UnixMillis, result: &ShardResult) {
    match result {
        ShardResult::ProjectorRidge(ridge) => {
            let file = files.entry(training.to_owned()).or_insert_with(|| Writer::new(at));
            for fit in &ridge.layers {
                file.scalars(at, fit.layer.into(), &[("r2/keys", fit.r2_key), ("r2/values", fit.r2_value)]);
            }
        }
        ShardResult::ProjectorSteps(steps) => {
            let folder = format!("{training}/replica-{}", steps.replica);
            let file = files.entry(folder).or_insert_with(|| Writer::new(at));
            for row in &steps.steps {
                let scalars = [
                    ("loss", row.loss),
                    ("learning_rate", row.learning_rate),
                    ("gradient_norm", row.gradient_norm),
                    ("gates/temperature", row.temperature),
                    ("samples", row.sample as f64),
                ];
                file.scalars(at, row.step, &scalars);
            }
            if let Some(last) = steps.steps.last() {
                file.gates(at, last.step, &steps.gates);
            }
            if let Some(validation) = &steps.validation {
                let file = files.entry(training.to_owned()).or_insert_with(|| Writer::new(at));
                let scalars =
                    [("validation/matched", validation.matched), ("validation/mismatched", validation.mismatched)];
                file.scalars(at, steps.steps.first().map_or(0, |first| first.step), &scalars);
            }
        }
        ShardResult::ProjectorRound(round) => {
            let file = files.entry(training.to_owned()).or_insert_with(|| Writer::new(at));
            let scalars = [
                ("outer/delta_norm", round.delta_norm),
                ("outer/learning_rate", round.learning_rate),
                ("outer/momentum", round.momentum),
                ("outer/samples", round.counted as f64),
                ("outer/replicas", round.samples.len() as f64),
            ];
            file.scalars(at, round.round.into(), &scalars);
        }
        _ => {}
    }
}

/// One event file on its way.
struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// A file begins with the version of its form.
    fn new(at: UnixMillis) -> Self {
        let mut event = wall_time(at);
        bytes_field(&mut event, 3, b"brain.Event:2");
        let mut writer = Self { bytes: Vec::new() };
        writer.record(&event);
        writer
    }

    fn scalars(&mut self, at: UnixMillis, step: u64, scalars: &[(&str, f64)]) {
        let mut summary = Vec::new();
        for (tag, number) in scalars {
            let mut value = Vec::new();
            bytes_field(&mut value, 1, tag.as_bytes());
            value.push(2 << 3 | 5);
            #[expect(clippy::cast_possible_truncation, reason = "the format has 32 bits")]
            value.extend((*number as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &value);
        }
        let mut event = wall_time(at);
        event.push(2 << 3);
        varint(&mut event, step);
        bytes_field(&mut event, 5, &summary);
        self.record(&event);
    }

    fn gates(&mut self, at: UnixMillis, step: u64, gates: &[LayerGate]) {
        let share = gates_open(gates) as f64 / (2 * gates.len()).max(1) as f64;
        self.scalars(at, step, &[("gates/open", share)]);
        for gate in gates {
            let tags = ["keys", "values"].map(|tensor| format!("gates/{tensor}/layer-{:02}", gate.layer));
            self.scalars(at, step, &[(&tags[0], gate.key), (&tags[1], gate.value)]);
        }
    }

    fn record(&mut self, data: &[u8]) {
        let length = (data.len() as u64).to_le_bytes();
        self.bytes.extend(length);
        self.bytes.extend(masked(crc32c(&length)).to_le_bytes());
        self.bytes.extend(data);
        self.bytes.extend(masked(crc32c(data)).to_le_bytes());
    }
}

fn wall_time(at: UnixMillis) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend((at.0 as f64 / 1000.0).to_le_bytes());
    event
}

fn bytes_field(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

/// CRC-32C (Castagnoli), reflected, bit by bit: files are small.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// As TFRecord stores it, so that a checksum of data with checksums in it says something.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Scalars of a file: (tag, step, value), each record's checksums checked.
    pub(in crate::report) fn read_back(mut bytes: &[u8]) -> Vec<(String, u64, f32)> {
        let mut scalars = Vec::new();
        let mut first = true;
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert_eq!(u32::from_le_bytes(bytes[8..12].try_into().unwrap()), masked(crc32c(&bytes[..8])));
            let (data, rest) = bytes[12..].split_at(length as usize);
            assert_eq!(u32::from_le_bytes(rest[..4].try_into().unwrap()), masked(crc32c(data)));
            bytes = &rest[4..];
            let fields = fields(data);
            assert!(f64::from_le_bytes(fields[0].1.try_into().unwrap()) > 1e9, "seconds since 1970");
            if std::mem::take(&mut first) {
                assert_eq!(fields[1], (3, b"brain.Event:2".as_slice()));
                continue;
            }
            let step = number(fields[1].1);
            for (_, value) in self::fields(fields[2].1) {
                let value = self::fields(value);
                let tag = String::from_utf8(value[0].1.to_vec()).unwrap();
                scalars.push((tag, step, f32::from_le_bytes(value[1].1.try_into().unwrap())));
            }
        }
        scalars
    }

    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |number, byte| number << 7 | u64::from(byte & 0x7f))
    }

    /// Protobuf's fields: number and bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
        let mut fields = Vec::new();
        while let Some((key, rest)) = bytes.split_first() {
            let digits = |bytes: &[u8]| 1 + bytes.iter().take_while(|byte| **byte & 0x80 != 0).count();
            let (skip, length) = match key & 7 {
                0 => (0, digits(rest)),
                1 => (0, 8),
                5 => (0, 4),
                2 => (digits(rest), usize::try_from(number(&rest[..digits(rest)])).unwrap()),
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, &rest[skip..skip + length]));
            bytes = &rest[skip + length..];
        }
        fields
    }

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, B.4, and the check value of CRC-32C.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn what_is_written_reads_back() {
        let at = UnixMillis(1_798_761_500_000);
        let mut writer = Writer::new(at);
        writer.scalars(at, 300, &[("loss", 2.5), ("learning_rate", 1e-3)]);
        writer.gates(at, 301, &[LayerGate { layer: 3, key: 1.0, value: -1.0 }]);
        let expected = [
            ("loss", 300, 2.5),
            ("learning_rate", 300, 1e-3),
            ("gates/open", 301, 0.5),
            ("gates/keys/layer-03", 301, 1.0),
            ("gates/values/layer-03", 301, -1.0),
        ];
        assert_eq!(read_back(&writer.bytes), expected.map(|(tag, step, value)| (tag.to_owned(), step, value)));
    }
}
