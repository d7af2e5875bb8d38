//! Inputs and events as lines of a trace.

use protocol::control::HeldSeat;

use crate::scheduler::{Event, Input};

/// An input in few words.
pub(super) fn describe(input: &Input) -> String {
    match input {
        Input::Heartbeat { worker, session, heartbeat } => {
            format!("heartbeat of {worker} on {session}, holds [{}]", list(&heartbeat.held))
        }
        Input::Connected(connected) => {
            let (worker, session, epoch) = (connected.worker, connected.session, connected.hello.epoch.0);
            format!("greeting of {worker} on {session}, epoch {epoch}, holds [{}]", list(&connected.hello.held))
        }
        Input::SeatFinished { worker, session, finished } => {
            format!("{worker} on {session}: finished {} {}", finished.attempt, finished.role)
        }
        Input::SeatFailed { worker, session, failed } => {
            let (attempt, role, kind) = (failed.attempt, failed.role, failed.failure.kind);
            format!("{worker} on {session}: failed {attempt} {role}: {kind}")
        }
        Input::Submit(run) => format!("submit {} shards", run.specs.len()),
        other => format!("{other:?}"),
    }
}

/// An event in few words.
pub(super) fn fact(event: &Event) -> String {
    match event {
        Event::AttemptPlaced(placed) => {
            let seats: Vec<_> = placed.seats.iter().map(|seat| format!("{} on {}", seat.role, seat.device)).collect();
            format!("AttemptPlaced {}: {seats:?}", placed.attempt)
        }
        Event::SeatCompleted(done) => format!("SeatCompleted {} {}", done.attempt, done.role),
        Event::DevicesReported { worker, report } => {
            format!("DevicesReported {worker}, {} devices", report.devices.len())
        }
        Event::RunAccepted(accepted) => format!("RunAccepted {}, {} shards", accepted.run, accepted.specs.len()),
        other => format!("{other:?}"),
    }
}

fn list(held: &[HeldSeat]) -> String {
    let seats: Vec<_> = held.iter().map(|seat| format!("{} {}", seat.attempt, seat.role)).collect();
    seats.join(", ")
}
