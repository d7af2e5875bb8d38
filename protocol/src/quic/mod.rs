//! QUIC as bonepile uses it: the one place of endpoint, transport and TLS settings, of admission and of framed streams.
//!
//! What it deliberately does not do: no resumption, no session tickets, no 0-RTT (a resumed session would skip the client
//! certificate's check), no TLS below 1.3, no default crypto provider of the process.
//!
//! Layout:
//! - [`settings`]: sockets, endpoints, what each side allows the other.
//! - [`certificate`]: what a certificate says about its holder.
//! - [`pin`]: believing one authority by its fingerprint, for joining.
//! - [`admission`]: the only maker of [`Member`] and [`Joiner`], so the only door for peers.
//! - [`joining`]: the box's side of joining, and dialling.
//! - [`stream`]: messages on streams.
//! - [`refusal`]: how a connection ended, in words.

pub mod admission;
pub mod certificate;
pub mod joining;
pub mod pin;
pub mod refusal;
pub mod settings;
pub mod stream;

pub use admission::{Admitted, Joiner, Member, NotAdmitted, admit};
pub use certificate::{CertificateFacts, spki_sha256};
pub use joining::{DialError, JoinError, dial, join};
pub use refusal::explain;
pub use settings::{Credentials, EndpointSecret, bind, client_config, join_client_config, server_config};
pub use stream::{FrameReader, ReadFrameError, Received, WriteFrameError, close_with, write_frame, write_frames};
