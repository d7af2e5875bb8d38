//! The sizes of this box's models, which the coordinator figures memory with.
//!
//! Asked of the executor for processors, which reads headers only, once at the start. Models of the catalogue are known to
//! everyone. A model that cannot be read is left out: it is reported by name all the same, and fails where it is loaded.

use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};

use protocol::catalogue;
use protocol::limits::MODEL_SHAPES_MAX;
use protocol::memory::ModelShape;
use protocol::models::ModelsDir;

use super::question::answer;

/// How long the header of one model may take: a vocabulary of 262144 tokens takes half a second on an old box.
const ONE: Duration = Duration::from_secs(10);
/// How long all of them may take: the agent waits for it before it dials.
const ALL: Duration = Duration::from_secs(30);

/// Shapes of the models that are here and not in the catalogue, by name.
pub(super) fn ask(executor: &Path, models: &ModelsDir) -> Vec<(String, ModelShape)> {
    let begun = Instant::now();
    let mut shapes = Vec::new();
    let own = models.answers_to().into_iter().filter(|name| catalogue::model(name).is_none());
    for name in own.take(MODEL_SHAPES_MAX) {
        let Some(left) = ALL.checked_sub(begun.elapsed()) else {
            tracing::warn!("sizes of models not asked for any more after {} s", ALL.as_secs());
            break;
        };
        match shape(executor, models, &name, ONE.min(left)) {
            Ok(shape) => shapes.push((name, shape)),
            Err(why) => tracing::warn!(model = name, "its sizes are not known: {why}"),
        }
    }
    shapes
}

fn shape(executor: &Path, models: &ModelsDir, name: &str, limit: Duration) -> Result<ModelShape, String> {
    let (path, _) = models.locate(name).map_err(|error| error.to_string())?;
    let arguments =
        [OsStr::new("model"), OsStr::new("shape"), OsStr::new("--json"), OsStr::new("--"), path.as_os_str()];
    serde_json::from_slice(&answer(executor, arguments, limit)?).map_err(|error| error.to_string())
}
