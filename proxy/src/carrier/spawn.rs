//! Tasks that HTTP connections need, owned by the sidecar: its shutdown waits for them.

use std::future::Future;

use tokio_util::task::TaskTracker;

/// Lets hyper spawn what the sidecar's [`TaskTracker`] waits for.
#[derive(Debug, Clone, Default)]
pub struct Spawn(pub TaskTracker);

impl<F> hyper::rt::Executor<F> for Spawn
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}
