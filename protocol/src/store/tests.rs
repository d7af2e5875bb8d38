//! The store under faults: whatever fails, nothing half-written can be seen and nothing published is lost.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use rustix::io::Errno;

use super::*;
use crate::control::{Output, Usage};
use crate::experiment::{InspectSpec, LayerSelection, ShardSpec};
use crate::hardware::DeviceKind;
use crate::ids::{DeviceId, Fence, Role, WorkerId};

const NOW: UnixMillis = UnixMillis(1_900_000_000_000);

fn manifest(shard: &str, fence: u64, outputs: Vec<Output>) -> Manifest {
    Manifest {
        format: Manifest::FORMAT,
        shard: shard.parse().unwrap(),
        sweep: "test".to_owned(),
        spec: ShardSpec::Inspect(InspectSpec {
            model: "smollm2-135m-instruct".to_owned(),
            layers: LayerSelection::All,
            texts: 2,
            seed: 7,
        }),
        seed: 7,
        fence: Fence(fence),
        coordinator_build: "0.1.0".to_owned(),
        seats: vec![SeatRecord {
            role: Role::Main,
            worker: WorkerId(1),
            hostname: "box".to_owned(),
            device: DeviceId("cpu".to_owned()),
            device_kind: DeviceKind::Cpu,
            device_model: "a processor".to_owned(),
            executor_build: "0.1.0".to_owned(),
            models: BTreeMap::new(),
            outputs,
            usage: Usage::default(),
        }],
        inputs: Vec::new(),
        started: NOW,
        finished: NOW.plus_ms(10),
    }
}

fn output(name: &str, (hash, bytes): (ArtifactHash, u64)) -> Output {
    Output { name: name.to_owned(), hash, bytes }
}

/// Lets the n-th call answer `errno`, and every later one too if `sticky`. A failing write leaves half of its bytes.
#[derive(Debug)]
struct FaultyDisk {
    calls: Arc<AtomicU32>,
    fail_at: u32,
    sticky: bool,
    errno: Errno,
}

impl FaultyDisk {
    fn new(fail_at: u32, sticky: bool, errno: Errno) -> Self {
        Self { calls: Arc::default(), fail_at, sticky, errno }
    }

    fn turn(&self) -> io::Result<()> {
        let call = self.calls.fetch_add(1, SeqCst);
        if call == self.fail_at || self.sticky && call > self.fail_at { Err(self.errno.into()) } else { Ok(()) }
    }
}

impl Disk for FaultyDisk {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.turn()?;
        let file = RealDisk.create_new(path)?;
        let turns = Self { calls: self.calls.clone(), ..*self };
        Ok(Box::new(FaultyFile { file, turns }))
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.turn()?;
        RealDisk.link(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.turn()?;
        RealDisk.remove(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.turn()?;
        RealDisk.sync_dir(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.turn()?;
        RealDisk.create_dir(path)
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.turn()?;
        RealDisk.create_dir_all(path)
    }
    fn open(&self, path: &Path) -> io::Result<File> {
        self.turn()?;
        RealDisk.open(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.turn()?;
        RealDisk.list(path)
    }
}

struct FaultyFile {
    file: Box<dyn DiskFile>,
    turns: FaultyDisk,
}

impl Write for FaultyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.turns.turn() {
            self.file.write_all(&bytes[..bytes.len() / 2])?;
            return Err(error);
        }
        self.file.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl DiskFile for FaultyFile {
    fn sync_all(&mut self) -> io::Result<()> {
        self.turns.turn()?;
        self.file.sync_all()
    }
}

#[test]
fn publishes_reads_back_and_checks_clean() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("store");
    let store = Store::init(&root, NOW).unwrap();
    let small = store.publish_bytes(b"result").unwrap();
    let source = directory.path().join("cache");
    let bytes: Vec<u8> = (0..3 * COPY_BYTES + 17).map(|i| (i % 251) as u8).collect();
    fs::write(&source, &bytes).unwrap();
    let large = store.publish_file(&source).unwrap();
    assert_eq!(large, (ArtifactHash::of(&bytes), bytes.len() as u64));
    assert_eq!(store.publish_file(&source).unwrap(), large, "publishing twice is one artifact");

    let reopened = Store::open(&root, Some(store.uuid())).unwrap();
    assert_eq!(reopened.read_verified(&small.0).unwrap(), b"result");
    let mut copy = Vec::new();
    reopened.open_verified(&large.0).unwrap().read_to_end(&mut copy).unwrap();
    assert_eq!(copy, bytes);
    assert!(!reopened.contains(&ArtifactHash::of(b"never")).unwrap());

    let first = manifest("r1.0", 4, vec![output("result.json", small), output("cache", large)]);
    assert!(store.write_manifest(&first).unwrap());
    assert!(!store.write_manifest(&first).unwrap());
    let other = Manifest { fence: Fence(5), ..first.clone() };
    assert!(matches!(store.write_manifest(&other), Err(StoreError::ManifestOfAnotherAttempt { .. })));
    assert!(store.write_manifest(&manifest("r1.10", 6, vec![])).unwrap());
    assert!(store.write_manifest(&manifest("r1.2", 7, vec![])).unwrap());
    let read = reopened.read_manifests(RunId(1)).unwrap();
    assert_eq!(read.iter().map(|manifest| manifest.shard.index).collect::<Vec<_>>(), [0, 2, 10]);
    assert_eq!(read[0], first);
    assert_eq!(reopened.read_manifests(RunId(2)).unwrap(), []);

    let report = store.fsck(NOW).unwrap();
    assert_eq!((report.blobs, report.manifests, report.referenced, report.unreferenced), (2, 3, 2, 0));
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn what_a_shard_was_made_from_counts_as_used() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::init(&directory.path().join("store"), NOW).unwrap();
    let made = store.publish_bytes(b"made").unwrap();
    let given = store.publish_bytes(b"given").unwrap();
    let inputs = vec![output("base", (given.0, 0)), output("gone", (ArtifactHash::of(b"gone"), 4))];
    let manifest = Manifest { inputs, ..manifest("r1.0", 1, vec![output("result.json", made)]) };
    store.write_manifest(&manifest).unwrap();
    let report = store.fsck(NOW).unwrap();
    assert_eq!((report.referenced, report.unreferenced), (2, 0), "a length that is not known is no finding");
    let kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [FindingKind::MissingBlob]);
}

#[test]
fn a_folder_beside_reports_is_of_one_moment() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::init(&directory.path().join("store"), NOW).unwrap();
    let files = |text: &[u8]| [("a/x".to_owned(), b"same".to_vec()), ("a/b/y".to_owned(), text.to_vec())];
    let first = store.write_report_folder(RunId(3), "events", &files(b"one")).unwrap();
    assert_eq!(store.write_report_folder(RunId(3), "events", &files(b"one")).unwrap(), first);
    let second = store.write_report_folder(RunId(3), "events", &files(b"two")).unwrap();
    assert!(first.ends_with("events") && second.ends_with("events-2"));
    assert_eq!(fs::read(first.join("a/b/y")).unwrap(), b"one");
    assert_eq!(fs::read(second.join("a/b/y")).unwrap(), b"two");
    for path in ["../x", "/x", "a//x", ".x"] {
        let files = [(path.to_owned(), Vec::new())];
        let refused = store.write_report_folder(RunId(3), "events", &files);
        assert!(matches!(refused, Err(StoreError::BadName { .. })), "{path}");
    }
}

#[test]
fn a_report_never_changes_under_its_readers() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::init(&directory.path().join("store"), NOW).unwrap();
    let first = store.write_report(RunId(3), "report.html", b"one").unwrap();
    assert_eq!(store.write_report(RunId(3), "report.html", b"one").unwrap(), first);
    let second = store.write_report(RunId(3), "report.html", b"two").unwrap();
    assert!(second.ends_with("reports/r3/report-2.html"), "{}", second.display());
    assert_eq!((fs::read(first).unwrap(), fs::read(second).unwrap()), (b"one".to_vec(), b"two".to_vec()));
    for name in ["", "../x", ".hidden", "a/b"] {
        assert!(matches!(store.write_report(RunId(3), name, b""), Err(StoreError::BadName { .. })), "{name}");
    }
}

#[test]
fn knows_its_own_store_from_others_and_from_an_empty_mount_point() {
    let directory = tempfile::tempdir().unwrap();
    let (a, b) = (directory.path().join("a"), directory.path().join("b"));
    let store = Store::init(&a, NOW).unwrap();
    Store::init(&b, NOW).unwrap();
    assert!(matches!(Store::init(&a, NOW), Err(StoreError::NotEmpty { .. })));
    assert!(matches!(Store::open(&b, Some(store.uuid())), Err(StoreError::WrongStore { .. })));
    let missing = Store::open(&directory.path().join("c"), None).unwrap_err();
    assert!(matches!(missing, StoreError::NotMounted { .. }), "{missing}");
    assert!(!directory.path().join("c").exists(), "opening never makes a root");

    // The mount goes away under an opened store: an empty directory stands there.
    fs::rename(&a, directory.path().join("away")).unwrap();
    fs::create_dir_all(a.join("blobs")).unwrap();
    let error = store.publish_bytes(b"x").unwrap_err();
    assert!(matches!(error, StoreError::NotMounted { .. }) && error.may_pass(), "{error}");
    assert_eq!(fs::read_dir(a.join("blobs")).unwrap().count(), 0);

    fs::write(b.join(SENTINEL), r#"{"store_uuid":"u","layout":9,"created":0}"#).unwrap();
    assert!(matches!(Store::open(&b, None), Err(StoreError::Layout { got: 9, .. })));
    fs::write(b.join(SENTINEL), "half").unwrap();
    assert!(matches!(Store::open(&b, None), Err(StoreError::Corrupt { .. })));
}

#[test]
fn fsck_names_every_kind_of_damage() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("store");
    let store = Store::init(&root, NOW).unwrap();
    let good = store.publish_bytes(b"good").unwrap();
    let gone = store.publish_bytes(b"gone").unwrap();
    let rotten = store.publish_bytes(b"rotten").unwrap();
    let outputs =
        vec![output("good", good), output("gone", gone), output("rotten", rotten), output("long", (good.0, 9))];
    store.write_manifest(&manifest("r1.0", 1, outputs)).unwrap();
    store.publish_bytes(b"of an attempt under way").unwrap();
    fs::remove_file(store.blob_path(&gone.0)).unwrap();
    fs::write(store.blob_path(&rotten.0), b"rottem").unwrap();
    assert!(matches!(store.read_verified(&rotten.0), Err(StoreError::Corrupt { .. })));
    assert!(matches!(store.publish_bytes(b"rotten"), Err(StoreError::Corrupt { .. })), "a corrupt file is no success");
    assert!(matches!(store.open_verified(&gone.0), Err(StoreError::Missing { .. })));
    fs::write(root.join("manifests/r1/r1.1.json"), "{").unwrap();
    fs::write(root.join("blobs/00/.tmp-w1-abc"), "x").unwrap();
    fs::write(root.join("blobs/00/.nfs0001"), "x").unwrap();
    fs::write(root.join("blobs/00/notes.txt"), "x").unwrap();
    fs::remove_dir(root.join("blobs/01")).or_else(|_| fs::remove_dir(root.join("blobs/02"))).unwrap();

    let report = store.fsck(std::time::SystemTime::now().into()).unwrap();
    assert_eq!((report.blobs, report.referenced, report.unreferenced, report.temporaries), (3, 2, 1, 1));
    let mut kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind).collect();
    kinds.sort();
    use FindingKind::*;
    assert_eq!(kinds, [CorruptBlob, MissingBlob, WrongLength, BadManifest, MissingDirectory, Stray]);
    let later = UnixMillis::from(std::time::SystemTime::now()).plus_ms(49 * 3_600_000);
    assert!(store.fsck(later).unwrap().findings.iter().any(|finding| finding.kind == OldTemporary));
}

/// For every call that a publication makes and every errno: it fails, or succeeds wholly; the store then checks clean and the
/// same publication on a healthy disk succeeds.
#[test]
fn no_fault_leaves_anything_half_visible_or_loses_anything() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::init(&directory.path().join("store"), NOW).unwrap();
    let kept = store.publish_bytes(b"published before").unwrap();
    let mut failures = BTreeMap::new();
    let mut run = 0;
    for errno in [Errno::NOSPC, Errno::ROFS, Errno::IO, Errno::STALE] {
        for sticky in [false, true] {
            for fail_at in 0.. {
                assert!(fail_at < 100, "a publication makes a bounded number of calls");
                run += 1;
                let disk = Arc::new(FaultyDisk::new(fail_at, sticky, errno));
                let faulty = Store { disk: disk.clone(), ..store.clone() };
                let text = format!("published under fault {run}");
                let publish = |store: &Store| {
                    let made = store.publish_bytes(text.as_bytes())?;
                    let outputs = vec![output("kept", kept), output("new", made)];
                    store.write_manifest(&manifest(&format!("r{run}.0"), 1, outputs))?;
                    store.read_verified(&made.0)
                };
                let outcome = publish(&faulty);
                let report = store.fsck(UnixMillis::from(std::time::SystemTime::now())).unwrap();
                assert!(report.is_clean(), "{report:?}");
                assert_eq!(store.read_verified(&kept.0).unwrap(), b"published before");
                assert_eq!(publish(&store).unwrap(), text.as_bytes(), "a healthy disk makes it good");
                match outcome {
                    Err(error) => {
                        assert!(error.may_pass(), "{error:?}");
                        *failures.entry((errno.raw_os_error(), sticky)).or_insert(0) += 1;
                    }
                    Ok(_) if disk.calls.load(SeqCst) <= fail_at => break,
                    Ok(_) => {}
                }
            }
        }
    }
    // Single trouble of the server while a file is written is survived by writing it again; lasting trouble and a full disk
    // are not.
    let count = |errno: Errno, sticky| failures[&(errno.raw_os_error(), sticky)];
    assert!(count(Errno::IO, false) < count(Errno::IO, true), "{failures:?}");
    assert!(count(Errno::IO, false) < count(Errno::NOSPC, false), "{failures:?}");
    assert!(count(Errno::ROFS, true) > 15, "{failures:?}");
}

/// On a file system of 1 MiB that is really full, then really read-only, then really unmounted. Needs the right to mount.
#[test]
fn a_disk_that_is_full_then_read_only_then_gone() {
    let directory = tempfile::tempdir().unwrap();
    let mount_point = directory.path().join("mnt");
    fs::create_dir(&mount_point).unwrap();
    let mount = |options: &str| {
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "bonepile-test"]).arg(&mount_point).output();
        status.is_ok_and(|output| output.status.success())
    };
    if !mount("size=1m") {
        eprintln!("skipped: this user may not mount a tmpfs");
        return;
    }
    let unmount = Unmount(&mount_point);
    let root = mount_point.join("store");
    let store = Store::init(&root, NOW).unwrap();
    let kept = store.publish_bytes(b"kept").unwrap();
    let source = directory.path().join("large");
    fs::write(&source, vec![7; 2 << 20]).unwrap();
    let error = store.publish_file(&source).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("free space"));
    let report = store.fsck(NOW).unwrap();
    assert_eq!((report.blobs, report.temporaries, report.is_clean()), (1, 0, true), "{report:?}");
    let after = store.publish_bytes(b"fits again").unwrap();

    assert!(mount("remount,ro"));
    let error = store.publish_bytes(b"more").unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly { .. }) && error.hint().unwrap().contains("uid"), "{error:?}");
    assert_eq!(store.read_verified(&kept.0).unwrap(), b"kept");
    assert_eq!(store.read_verified(&after.0).unwrap(), b"fits again");

    drop(unmount);
    assert!(matches!(store.publish_bytes(b"more"), Err(StoreError::NotMounted { .. })));
    assert_eq!(fs::read_dir(&mount_point).unwrap().count(), 0, "nothing was written under the mount point");
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("-l").arg(self.0).status();
        assert!(status.is_ok_and(|status| status.success()), "unmounting {}", self.0.display());
    }
}
