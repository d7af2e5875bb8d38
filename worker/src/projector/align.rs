//! Which token of one model stands for which of another, and which layers for which layer.
//!
//! **Tokens.** Both models read the same text, each with its own tokenizer. A target token is given the source token that
//! shares the most bytes of the text with it. Of several that share equally many, the last: it has seen the most of the text.
//! A target token that no source token touches (tokenizers may leave a space to nobody) is given the last source token that
//! begins before it ends. Tokens that are no text (BOS, roles of a chat template) are given the source's first token, where
//! attention sinks lie.
//!
//! **Layers.** By depth; see [`LayerMap`]. Does not look at numbers of caches.

use protocol::experiment::projector::LayerMap;

use super::error::ProjectorError;
use crate::cache::{CacheLayout, Span};

/// For each target column, the source column that stands for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alignment {
    columns: Vec<usize>,
    source_len: usize,
}

impl Alignment {
    /// Aligns tokens by where they stand in their common text; spans ascend by begin.
    ///
    /// # Errors
    /// [`ProjectorError::Alignment`] if the source has no tokens.
    pub fn by_spans(target: &[Span], source: &[Span]) -> Result<Self, ProjectorError> {
        if source.is_empty() {
            return Err(ProjectorError::Alignment { what: "the source read nothing".to_owned() });
        }
        let columns = target.iter().map(|span| partner(*span, source)).collect();
        Ok(Self { columns, source_len: source.len() })
    }

    /// The source column of each target column.
    pub fn columns(&self) -> &[usize] {
        &self.columns
    }

    /// Target columns.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// True for a target that read nothing.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// Columns that the source's cache must have.
    pub fn source_len(&self) -> usize {
        self.source_len
    }
}

/// The source token with the most bytes in common; the last of equals.
fn partner((begin, end): Span, source: &[Span]) -> usize {
    if begin >= end {
        return 0;
    }
    let overlap = |other: &Span| end.min(other.1).saturating_sub(begin.max(other.0));
    let (mut best, mut most) = (0, 0);
    for (column, other) in source.iter().enumerate() {
        let shared = overlap(other);
        if (shared > 0 && shared >= most) || (most == 0 && other.0 < other.1 && other.0 < end) {
            (best, most) = (column, shared);
        }
    }
    best
}

/// The source layers of each target layer, ascending.
///
/// # Errors
/// [`ProjectorError::Layers`] for a map that asks for layers that are not there, or for none.
pub fn layers(map: &LayerMap, source: &CacheLayout, target: &CacheLayout) -> Result<Vec<Vec<usize>>, ProjectorError> {
    let (sources, targets) = (source.layers.len(), target.layers.len());
    let wrong = |what: String| Err(ProjectorError::Layers { what });
    match map {
        LayerMap::LastAligned => {
            Ok((0..targets).map(|layer| vec![(layer + sources).saturating_sub(targets).min(sources - 1)]).collect())
        }
        LayerMap::Proportional(count) => {
            let count = *count as usize;
            if count == 0 || count > sources {
                return wrong(format!("{count} source layers for each target layer; the source has {sources}"));
            }
            Ok((0..targets).map(|layer| nearest(layer, targets, sources, count)).collect())
        }
        LayerMap::Given(lists) => {
            if lists.len() != targets {
                return wrong(format!("{} lists are given, the target has {targets} layers", lists.len()));
            }
            lists.iter().enumerate().map(|(layer, list)| given(layer, list, sources)).collect()
        }
    }
}

/// The `count` source layers nearest to target layer `layer` by relative depth: j / (L_s - 1) against n / (L_t - 1), compared
/// in whole numbers; of two equally near, the deeper.
fn nearest(layer: usize, targets: usize, sources: usize, count: usize) -> Vec<usize> {
    let (last_target, last_source) = ((targets - 1).max(1), (sources - 1).max(1));
    let distance = |candidate: usize| (candidate * last_target).abs_diff(layer * last_source);
    let mut order: Vec<usize> = (0..sources).collect();
    order.sort_by(|a, b| distance(*a).cmp(&distance(*b)).then(b.cmp(a)));
    order.truncate(count);
    order.sort_unstable();
    order
}

fn given(layer: usize, list: &[u32], sources: usize) -> Result<Vec<usize>, ProjectorError> {
    let wrong = |what: String| ProjectorError::Layers { what };
    if list.is_empty() {
        return Err(wrong(format!("target layer {layer} is given no source layer")));
    }
    let mut layers: Vec<usize> = list.iter().map(|source| *source as usize).collect();
    layers.sort_unstable();
    if let Some(pair) = layers.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(wrong(format!("target layer {layer} is given source layer {} twice", pair[0])));
    }
    match layers.last() {
        Some(last) if *last >= sources => {
            Err(wrong(format!("target layer {layer} is given source layer {last}, the source has {sources}")))
        }
        _ => Ok(layers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::projector::testing::layout;

    fn columns(target: &[Span], source: &[Span]) -> Vec<usize> {
        Alignment::by_spans(target, source).unwrap().columns
    }

    #[test]
    fn a_token_takes_the_one_it_shares_most_with() {
        // Source: "Al" "ice" " lives"; target: BOS "Alice" " l" "ives".
        let source = [(0, 2), (2, 5), (5, 11)];
        assert_eq!(columns(&[(0, 0), (0, 5), (5, 7), (7, 11)], &source), [0, 1, 2, 2]);
    }

    #[test]
    fn ties_go_to_the_last_and_gaps_to_the_token_before() {
        assert_eq!(columns(&[(0, 4)], &[(0, 2), (2, 4)]), [1]);
        // Bytes of one character: two source tokens over the same span.
        assert_eq!(columns(&[(0, 4)], &[(0, 4), (0, 4), (4, 5)]), [1]);
        // The space between belongs to nobody in the source.
        assert_eq!(columns(&[(3, 4)], &[(0, 3), (4, 7)]), [0]);
        // BOS of the source is never text.
        assert_eq!(columns(&[(0, 0), (0, 3)], &[(0, 0), (0, 3)]), [0, 1]);
        assert!(matches!(Alignment::by_spans(&[(0, 1)], &[]), Err(ProjectorError::Alignment { .. })));
    }

    #[test]
    fn layers_go_by_depth() {
        let (deep, shallow) = (layout("deep", 30), layout("shallow", 18));
        let last = layers(&LayerMap::LastAligned, &deep, &shallow).unwrap();
        assert_eq!((last[0].as_slice(), last[17].as_slice()), ([12].as_slice(), [29].as_slice()));
        let last = layers(&LayerMap::LastAligned, &shallow, &deep).unwrap();
        assert_eq!((last[0][0], last[12][0], last[13][0], last[29][0]), (0, 0, 1, 17));
        let three = layers(&LayerMap::Proportional(3), &deep, &shallow).unwrap();
        assert_eq!((three[0].as_slice(), three[17].as_slice()), ([0, 1, 2].as_slice(), [27, 28, 29].as_slice()));
        assert!(three.iter().all(|list| list.len() == 3 && list[2] == list[0] + 2));
        assert_eq!(layers(&LayerMap::Proportional(1), &deep, &deep).unwrap()[13], [13]);
        assert_eq!(layers(&LayerMap::Proportional(1), &layout("one", 1), &shallow).unwrap()[5], [0]);
    }

    #[test]
    fn maps_that_name_layers_that_are_not_there_are_refused() {
        let (source, target) = (layout("s", 3), layout("t", 2));
        let text = |map: LayerMap| layers(&map, &source, &target).unwrap_err().to_string();
        assert_eq!(
            text(LayerMap::Proportional(4)),
            "layer map: 4 source layers for each target layer; the source has 3"
        );
        assert_eq!(text(LayerMap::Given(vec![vec![0]])), "layer map: 1 lists are given, the target has 2 layers");
        assert_eq!(
            text(LayerMap::Given(vec![vec![0], vec![3]])),
            "layer map: target layer 1 is given source layer 3, the source has 3"
        );
        assert_eq!(
            text(LayerMap::Given(vec![vec![1, 1], vec![0]])),
            "layer map: target layer 0 is given source layer 1 twice"
        );
        assert!(text(LayerMap::Given(vec![vec![], vec![0]])).ends_with("is given no source layer"));
        assert_eq!(
            layers(&LayerMap::Given(vec![vec![2, 0], vec![1]]), &source, &target).unwrap(),
            [vec![0, 2], vec![1]]
        );
    }
}
