//! The results store: layout, manifests, publishing, checking.
