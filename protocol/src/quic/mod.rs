//! Endpoint settings, certificates, framed streams on quinn: what both sides would otherwise write twice.
