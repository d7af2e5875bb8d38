//! Who may not come in: bad tokens, foreign clusters; and what both ends say about it.

use crate::cluster::{Cluster, both, rows};

#[test]
fn a_token_works_once() {
    let mut cluster = Cluster::init();
    cluster.serve();
    let token = cluster.token(&[]);
    let first = cluster.join(&token, &cluster.path("first"));
    assert!(first.status.success(), "{}", both(&first));
    let second = cluster.join(&token, &cluster.path("second"));
    assert_eq!(second.status.code(), Some(1), "{}", both(&second));
    let said = both(&second);
    assert!(said.contains("used") && said.contains("hint: "), "{said}");
    let log = cluster.read_log("coordinator.log");
    assert!(log.contains("refused") && log.contains("used"), "{log}");
}

#[test]
fn an_expired_token_is_refused() {
    let mut cluster = Cluster::init();
    cluster.serve();
    let token = cluster.token(&["--ttl", "1s"]);
    cluster.wait("the token to expire", || {
        let tokens = cluster.json(&["token", "list", "--json"]);
        (rows(&tokens, "tokens")[0]["state"] == "expired").then_some(())
    });
    let output = cluster.join(&token, &cluster.path("late"));
    assert_eq!(output.status.code(), Some(1), "{}", both(&output));
    let said = both(&output);
    assert!(said.contains("expired"), "{said}");
    assert!(said.contains("hint: "), "{said}");
    assert!(cluster.read_log("coordinator.log").contains("expired"));
}

#[test]
fn a_mangled_token_is_refused_before_any_connection() {
    let mut cluster = Cluster::init();
    cluster.serve();
    let token = cluster.token(&[]);
    for mangled in [&token[..token.len() - 5], "bpt1.", "hello", &format!("{token}xyz")] {
        let output = cluster.join(mangled, &cluster.path("nobody"));
        assert_eq!(output.status.code(), Some(2), "{mangled}: {}", both(&output));
        assert!(both(&output).contains("token"), "{}", both(&output));
    }
}

#[test]
fn a_worker_of_another_cluster_is_refused() {
    let mut home = Cluster::init();
    home.serve();
    home.add_worker();
    home.wait("the worker at home", || (home.online_workers() == 1).then_some(()));
    // The same box pointed at another cluster's coordinator: its certificate is worth nothing there.
    let mut other = Cluster::init();
    other.serve();
    let said = other.meet_foreign_worker(&home);
    assert!(said.contains("certificate"), "{said}");
    other.wait("the coordinator to say so too", || {
        let log = other.read_log("coordinator.log");
        (log.contains("refused a connection") && log.contains("certificate")).then_some(())
    });
    assert_eq!(other.online_workers(), 0);
    assert!(other.coordinator_is_alive());
    assert_eq!(home.online_workers(), 1, "home goes on");
}

#[test]
fn a_revoked_worker_stays_out() {
    let mut cluster = Cluster::with_workers(1);
    cluster.ok(&["revoke", "w1"]);
    cluster.wait("the worker to be told", || cluster.read_log("worker-0.log").contains("revoked").then_some(()));
    assert_eq!(cluster.online_workers(), 0);
    cluster.add_worker();
    cluster.wait("another worker", || (cluster.online_workers() == 1).then_some(()));
}
