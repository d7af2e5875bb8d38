//! `bonepile init`: cluster.toml from the commented example, the cluster's authority, an empty results store.
//!
//! Leaves what is there alone: a directory with a cluster in it is refused.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use protocol::config::ClusterConfig;
use protocol::store::Store;
use serde_json::json;

use super::args::Init;
use super::context::{Context, Outcome};
use super::exit;
use super::failure::Failure;
use super::output::Document;
use crate::authority::Authority;
use crate::clock;
use crate::serve::certificate_names;

/// The example at the top of the repository is the template: what is documented is what is made.
const TEMPLATE: &str = include_str!("../../../cluster.toml.example");

/// Runs the command.
///
/// # Errors
/// Exit code 2 for names and addresses that cannot be, 1 where files cannot be made.
pub fn run(context: &mut Context, args: &Init) -> Outcome {
    let made = make(args)?;
    let shown = made.config_path.display();
    let text = format!(
        "cluster      {}\nsettings     {shown}\nkeys         {}\nstore        {} ({})\n",
        made.config.name,
        made.config.state_dir.display(),
        made.config.store_path.display(),
        made.store_uuid,
    );
    let data = json!({
        "cluster": made.config.name,
        "config": made.config_path,
        "state_dir": made.config.state_dir,
        "store": made.config.store_path,
        "store_uuid": made.store_uuid,
    });
    context.show(&Document::new(&data, text))?;
    context.output.note(&format!("next: bonepile serve --config {shown}"));
    Ok(exit::OK)
}

/// A new cluster.
#[derive(Debug)]
pub struct Made {
    /// Its settings as read back from the file.
    pub config: ClusterConfig,
    /// Where the file is.
    pub config_path: PathBuf,
    /// Its store's identity.
    pub store_uuid: String,
}

/// Makes a cluster.
///
/// # Errors
/// As [`run`].
pub fn make(args: &Init) -> Result<Made, Failure> {
    let directory =
        std::path::absolute(&args.directory).map_err(|error| Failure::file("resolve", &args.directory, &error))?;
    let config_path = directory.join("cluster.toml");
    let text = settings(args);
    // Everything typed is checked before anything is made.
    let config = ClusterConfig::parse("cluster.toml", &directory, &text)
        .map_err(|error| Failure { excerpt: None, ..Failure::in_source("bad-config", &error, &text) })?;
    fs::create_dir_all(&directory).map_err(|error| Failure::file("create", &directory, &error))?;
    if config_path.exists() {
        return Err(Failure::usage("exists", format!("{} exists already", config_path.display()))
            .hint("name another directory, or use the cluster that is there"));
    }
    let store = make_store(&config.store_path)?;
    let names = certificate_names(&config);
    Authority::create(&config.state_dir, &config.name, &names, clock::system())?;
    write_new(&config_path, &text)?;
    Ok(Made { config, config_path, store_uuid: store.uuid().to_owned() })
}

/// An empty store that is there already is taken, as from an `init` that was cut short. One with results belongs to another
/// cluster: a new journal would give the same names to other results.
fn make_store(path: &Path) -> Result<Store, Failure> {
    if !path.join(protocol::store::SENTINEL).exists() {
        return Ok(Store::init(path, clock::now())?);
    }
    let manifests = path.join("manifests");
    let mut runs = fs::read_dir(&manifests).map_err(|error| Failure::file("list", &manifests, &error))?;
    if runs.next().is_some() {
        return Err(Failure::usage(
            "store-in-use",
            format!("the store at {} has results of another cluster", path.display()),
        )
        .hint("name another directory with --store"));
    }
    Ok(Store::open(path, None)?)
}

/// The template with what was typed in place of its defaults.
fn settings(args: &Init) -> String {
    let quoted = |text: &str| serde_json::to_string(text).expect("a text has a JSON form");
    let mut settings = Vec::from([("name", quoted(&args.name))]);
    if let Some(listen) = &args.listen {
        settings.push(("listen", quoted(listen)));
    }
    if !args.advertise.is_empty() {
        let list: Vec<_> = args.advertise.iter().map(|address| quoted(address)).collect();
        settings.push(("advertise", format!("[{}]", list.join(", "))));
    }
    if let Some(store) = &args.store {
        let store = std::path::absolute(store).unwrap_or_else(|_| store.clone());
        settings.push(("path", quoted(&store.to_string_lossy())));
    }
    let mut text = String::with_capacity(TEMPLATE.len());
    for line in TEMPLATE.lines() {
        let bare = line.trim_start_matches("# ");
        match settings.iter().find(|(key, _)| bare.strip_prefix(key).is_some_and(|rest| rest.starts_with(" = "))) {
            Some((key, value)) => writeln!(text, "{key} = {value}"),
            None => writeln!(text, "{line}"),
        }
        .expect("writing to a String cannot fail");
    }
    text
}

fn write_new(path: &Path, text: &str) -> Result<(), Failure> {
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|error| Failure::file("write", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(directory: &Path) -> Init {
        Init {
            directory: directory.to_owned(),
            name: "lab-1".to_owned(),
            store: None,
            listen: None,
            advertise: Vec::new(),
        }
    }

    #[test]
    fn makes_a_cluster_once() {
        let directory = tempfile::tempdir().unwrap();
        let made = make(&args(&directory.path().join("c"))).unwrap();
        assert_eq!(made.config.name, "lab-1");
        assert_eq!(crate::cli::context::read_config(&made.config_path).unwrap(), made.config);
        Store::open(&made.config.store_path, Some(&made.store_uuid)).unwrap();
        Authority::load(&made.config.state_dir, &[], clock::system()).unwrap();
        let again = make(&args(&directory.path().join("c"))).unwrap_err();
        assert_eq!((again.exit, again.code), (exit::USAGE, "exists"));
    }

    #[test]
    fn what_is_typed_replaces_the_defaults_and_is_checked_first() {
        let directory = tempfile::tempdir().unwrap();
        let typed = Init {
            listen: Some("127.0.0.1:9000".to_owned()),
            advertise: vec!["box \"x\".example:9000".to_owned(), "10.0.0.1:9000".to_owned()],
            store: Some(directory.path().join("nfs/store")),
            ..args(&directory.path().join("c"))
        };
        let made = make(&typed).unwrap();
        assert_eq!(made.config.listen, "127.0.0.1:9000");
        assert_eq!(made.config.advertise, typed.advertise);
        assert_eq!(made.config.store_path, directory.path().join("nfs/store"));
        for bad in [
            Init { name: "Lab".to_owned(), ..args(&directory.path().join("d")) },
            Init { listen: Some("9000".to_owned()), ..args(&directory.path().join("d")) },
        ] {
            assert_eq!(make(&bad).unwrap_err().exit, exit::USAGE);
            assert!(!directory.path().join("d").exists(), "nothing is made");
        }
    }

    #[test]
    fn the_example_shows_the_defaults() {
        let directory = Path::new("/c");
        let uncommented: String = TEMPLATE
            .lines()
            .map(|line| if line.contains(" = ") { line.trim_start_matches("# ") } else { line })
            .filter(|line| !line.starts_with("advertise"))
            .fold(String::new(), |text, line| text + line + "\n");
        let all = ClusterConfig::parse("c", directory, &uncommented).unwrap();
        assert_eq!(all, ClusterConfig::parse("c", directory, TEMPLATE).unwrap());
    }
}
