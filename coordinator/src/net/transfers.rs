//! Streams with artifacts, of workers without the store's mount: they bring what they made and take what they need.

use std::sync::Arc;

use protocol::control::{ToCoordinator, close};
use protocol::quic::{FrameReader, Member, Received, close_with};
use quinn::VarInt;

use super::{Shared, download, upload};

/// Serves the artifact streams of one connection, one after the other; ends with the connection.
pub(super) async fn serve(member: &Member, shared: &Arc<Shared>) {
    // One at a time keeps one worker from filling the disk's queue; others have connections of their own.
    while let Ok((mut send, receive)) = member.connection().accept_bi().await {
        let mut reader = FrameReader::<ToCoordinator>::new(receive);
        let worker = member.identity().worker;
        match reader.next().await {
            Ok(Some(Received::Message(ToCoordinator::Upload(wanted)))) => {
                upload::serve(worker, &wanted, reader.into_stream(), &mut send, shared).await;
            }
            Ok(Some(Received::Message(ToCoordinator::Download(wanted)))) => {
                download::serve(worker, wanted, &mut send, shared).await;
            }
            Ok(None) => {}
            Ok(_) => {
                member.connection().close(VarInt::from_u32(close::PROTOCOL), b"an upload or a download was expected");
                return;
            }
            Err(error) => {
                close_with(member.connection(), &error);
                return;
            }
        }
    }
}
