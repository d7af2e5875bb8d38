//! What is to be done with a model, what it takes on a device, and the smallest change that makes it fit. Pure.

use protocol::memory::{
    AdapterTraining, Backend, Capture, Element, Footprint, Inference, ModelShape, Optimiser, Phase, ProjectorKind,
    ProjectorTraining, Quantisation, Training, estimate,
};

/// Sequences that run while a cache is taken out and checked.
const CAPTURE_SEQUENCES: u32 = 3;
/// Texts below this are not shortened further.
const TOKENS_LEAST: u32 = 128;

/// Work on one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan<'a> {
    /// The model; of a projector, the one that receives.
    pub shape: &'a ModelShape,
    /// How its weights are held, and the source's.
    pub held: Quantisation,
    /// Tokens of each sequence.
    pub tokens: u32,
    /// What is done.
    pub work: Work<'a>,
}

/// What is done with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work<'a> {
    /// One sequence.
    Inference,
    /// Caches are taken out.
    Capture,
    /// A projector from the source's cache into the model's.
    Projector {
        /// Whose caches come in.
        source: &'a ModelShape,
        /// What is trained.
        kind: ProjectorKind,
    },
    /// Adapters.
    Lora {
        /// Their rank.
        rank: u32,
    },
    /// All weights.
    Full {
        /// What moves them.
        optimiser: Optimiser,
    },
}

/// Somewhere to compute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// For people.
    pub name: String,
    /// What it is.
    pub backend: Backend,
    /// Memory for shards, bytes.
    pub usable_bytes: u64,
}

/// Whether a plan fits a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As it is.
    Fits,
    /// After a change.
    Changed {
        /// Which.
        change: String,
        /// What it takes then, bytes.
        need_bytes: u64,
    },
    /// On two such places.
    Split {
        /// Further change, empty if none.
        change: String,
        /// What it takes on each of the two, bytes at most.
        need_bytes: u64,
    },
    /// Not even then.
    No,
}

impl<'a> Plan<'a> {
    /// What it takes there.
    pub fn footprint(&self, backend: Backend) -> Footprint {
        let phase = match self.work {
            Work::Inference => Phase::Inference(self.sequences(1, backend)),
            Work::Capture => {
                let (caches, cache_tokens) = (CAPTURE_SEQUENCES, self.tokens);
                Phase::Capture(Capture { running: self.sequences(CAPTURE_SEQUENCES, backend), caches, cache_tokens })
            }
            Work::Projector { source, kind } => self.projector(source, kind, Some(self.held)),
            Work::Lora { rank } => Phase::Adapter(AdapterTraining { rank, training: self.step(Optimiser::AdamW) }),
            Work::Full { optimiser } => Phase::Full(self.step(optimiser)),
        };
        estimate(self.shape, self.held, phase, backend)
    }

    /// Whether it fits, and if not, after which change: the projector narrower, weights smaller or texts shorter; on two places
    /// as it is; two of these changes; one of them on two places.
    pub fn verdict(&self, place: &Place) -> Verdict {
        let fits = |need: &u64| *need <= place.usable_bytes;
        if fits(&self.footprint(place.backend).peak()) {
            return Verdict::Fits;
        }
        let changed = |(change, plan): (String, Self)| {
            let need_bytes = plan.footprint(place.backend).peak();
            fits(&need_bytes).then_some(Verdict::Changed { change, need_bytes })
        };
        let halved = |(change, plan): (String, Self)| {
            let need_bytes = plan.half(place.backend);
            fits(&need_bytes).then_some(Verdict::Split { change, need_bytes })
        };
        let changes = self.changes();
        let pairs = changes.iter().flat_map(|(first, plan)| {
            let second = plan.changes().into_iter();
            second.map(move |(second, plan)| (format!("{first} and {second}"), plan))
        });
        let verdict = changes.iter().cloned().find_map(changed);
        let verdict = verdict.or_else(|| halved((String::new(), *self)));
        let verdict = verdict.or_else(|| pairs.into_iter().find_map(changed));
        verdict.or_else(|| changes.iter().cloned().find_map(halved)).unwrap_or(Verdict::No)
    }

    /// Single changes, each smaller than the one before of its kind.
    fn changes(&self) -> Vec<(String, Self)> {
        let mut changes = Vec::new();
        let mut plan = *self;
        while let Some((kind, narrower)) = plan.narrower() {
            changes.push((kind.to_string(), narrower));
            plan = narrower;
        }
        if let Work::Full { optimiser: Optimiser::AdamW } = self.work {
            let optimiser = Optimiser::AdamW8Bit;
            changes.push(("8-bit moments".to_owned(), Self { work: Work::Full { optimiser }, ..*self }));
        } else {
            let mut held = self.held;
            while let Some(smaller) = held.smaller() {
                changes.push((smaller.to_string(), Self { held: smaller, ..*self }));
                held = smaller;
            }
        }
        let mut tokens = self.tokens / 2;
        while tokens >= TOKENS_LEAST {
            changes.push((format!("{tokens} tokens"), Self { tokens, ..*self }));
            tokens /= 2;
        }
        changes
    }

    fn narrower(&self) -> Option<(ProjectorKind, Self)> {
        let Work::Projector { source, kind } = self.work else { return None };
        let kind = kind.narrower()?;
        Some((kind, Self { work: Work::Projector { source, kind }, ..*self }))
    }

    /// What the fuller of two places takes: of a projector the receiver's, for the source is the other; else half of the layers,
    /// with the head.
    fn half(&self, backend: Backend) -> u64 {
        if let Work::Projector { source, kind } = self.work {
            let receiver = estimate(self.shape, self.held, self.projector(source, kind, None), backend);
            let sender = Phase::Inference(self.sequences(1, backend));
            return receiver.peak().max(estimate(source, self.held, sender, backend).peak());
        }
        let footprint = self.footprint(backend);
        let shared = footprint.runtime + footprint.logits;
        let layers = footprint.peak().saturating_sub(shared);
        // A model does not fall into equal parts: one layer more on one side.
        shared + layers / 2 + layers / u64::from(self.shape.layers).max(1)
    }

    fn sequences(&self, sequences: u32, backend: Backend) -> Inference {
        let cache = match backend {
            Backend::Cpu { .. } => Element::F32,
            Backend::Cuda { .. } => Element::Half,
        };
        Inference { tokens: self.tokens, sequences, cache }
    }

    fn projector(&self, source: &'a ModelShape, kind: ProjectorKind, held: Option<Quantisation>) -> Phase<'a> {
        let training = Training { checkpointing: false, ..self.step(Optimiser::AdamW) };
        Phase::Projector(ProjectorTraining { source, source_held: held, projector: kind, training })
    }

    fn step(&self, optimiser: Optimiser) -> Training {
        Training { batch: 1, prefix: 0, tokens: self.tokens, checkpointing: true, optimiser }
    }
}

#[cfg(test)]
mod tests {
    use protocol::catalogue::{card, shape};

    use super::*;

    fn on(name: &str) -> Place {
        let usable_bytes = card(name).unwrap().usable_bytes();
        Place { name: name.to_owned(), backend: Backend::CARD, usable_bytes }
    }

    fn plan<'a>(model: &str, held: Quantisation, work: Work<'a>) -> Plan<'a> {
        Plan { shape: shape(model).unwrap(), held, tokens: 1024, work }
    }

    #[test]
    fn the_smallest_change_that_helps_is_named() {
        let llama = plan("llama-3.1-8b", Quantisation::F16, Work::Inference);
        assert_eq!(llama.verdict(&on("rtx-3090")), Verdict::Fits);
        let change = |card: &str| match llama.verdict(&on(card)) {
            Verdict::Changed { change, need_bytes } if need_bytes <= on(card).usable_bytes => change,
            other => panic!("{card}: {other:?}"),
        };
        assert_eq!((change("rtx-3060"), change("gtx-1080")), ("q8_0".to_owned(), "q6_k".to_owned()));
        let large = plan("llama-3.1-70b", Quantisation::F16, Work::Inference);
        assert!(matches!(large.verdict(&on("rtx-4090")), Verdict::Split { change, .. } if change == "q4_k_m"));
        assert_eq!(large.verdict(&on("gtx-1080")), Verdict::No);
    }

    #[test]
    fn a_projector_is_narrowed_before_weights_are() {
        let source = shape("qwen3-0.6b").unwrap();
        let work = Work::Projector { source, kind: ProjectorKind::C2C };
        let pair = plan("qwen2.5-0.5b", Quantisation::F16, work);
        let Verdict::Changed { change, .. } = pair.verdict(&on("gtx-1080")) else { panic!() };
        assert_eq!(change, "fuser of width 256");
        let full = plan("qwen2.5-0.5b", Quantisation::F16, Work::Full { optimiser: Optimiser::AdamW });
        assert!(matches!(full.verdict(&on("gtx-1080")), Verdict::Changed { change, .. } if change == "8-bit moments"));
    }
}
