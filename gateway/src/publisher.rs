//! Keeps the cluster's records in the log as its objects and workloads want them.

use std::sync::Arc;
use std::time::Duration;

use isthmus_federation::command::{ClusterFacts, Command};
use isthmus_federation::machine::WINDOW;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::hub::Hub;
use crate::publish::commands;
use crate::replication::{ReplicaList, advertised};
use crate::writer::{ClusterWriter, WriteError};

/// Changes are gathered for this long, so that ten objects applied at once are looked at once.
const GATHER: Duration = Duration::from_millis(20);
/// Records that are written at once: half of what the log takes from one writer out of order.
const AT_ONCE: usize = WINDOW / 2;
/// Pause after a write whose fate is not known: no leader, most likely.
const RETRY: Duration = Duration::from_secs(1);

/// Writes what differs, until `shutdown`; `facts` but for the addresses, which are those of all replicas.
pub async fn run(
    hub: Arc<Hub>,
    writer: ClusterWriter,
    facts: ClusterFacts,
    mut replicas: watch::Receiver<ReplicaList>,
    shutdown: CancellationToken,
) {
    let mut generation = hub.generation();
    // What the log refused: not tried again until it is wanted differently.
    let mut refused: Vec<Command> = Vec::new();
    loop {
        generation.borrow_and_update();
        let mut wanted = hub.wanted();
        let addresses = advertised(&replicas.borrow_and_update());
        wanted.facts = Some(ClusterFacts { addresses, ..facts.clone() });
        let todo = commands(&hub.registry(), hub.own(), &wanted);
        refused.retain(|command| todo.contains(command));
        let next: Vec<Command> = todo.into_iter().filter(|command| !refused.contains(command)).take(AT_ONCE).collect();
        let mut pause = (!next.is_empty()).then_some(Duration::ZERO);
        // Each is a record of its own, so their order does not matter; one write to disk serves many.
        let writes = next.iter().map(|command| writer.write(command.clone()));
        for (command, written) in next.iter().zip(futures_util::future::join_all(writes).await) {
            match written {
                Ok(index) => {
                    tracing::info!(index, record = command.kind(), subject = command.subject(), "written to the log");
                }
                Err(WriteError::Refused(refusal)) => {
                    tracing::warn!(reason = %refusal.reason, "the log refused a record of this cluster: {}", refusal.message);
                    refused.push(command.clone());
                }
                Err(error) => {
                    tracing::warn!(%error, "not written to the log yet; trying again");
                    pause = Some(RETRY);
                }
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = generation.changed(), if pause.is_none() => {
                if changed.is_err() {
                    return;
                }
                tokio::time::sleep(GATHER).await;
            }
            Ok(()) = replicas.changed(), if pause.is_none() => {}
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {
                // The registry that the write produced arrives by its own path; give it a moment.
                tokio::time::sleep(GATHER).await;
            }
        }
    }
}
