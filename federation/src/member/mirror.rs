//! What a gateway replica that is not its cluster's member holds instead of one: the member's last word.

use std::sync::Arc;

use tokio::sync::watch;

use super::{MemberConfig, MemberHandle, Status, Transport};
use crate::registry::Registry;

/// Feeds the handles that were made with it.
pub struct Mirror {
    registry: watch::Sender<Arc<Registry>>,
    status: watch::Sender<Status>,
}

impl Mirror {
    /// A mirror that shows `registry` until the member is heard, and a handle that reads it. Whatever needs
    /// a member is answered [`super::ProposeError::NotMember`].
    pub fn new(config: MemberConfig, registry: Arc<Registry>, transport: Arc<dyn Transport>) -> (Self, MemberHandle) {
        let (registry, registry_watch) = watch::channel(registry);
        let (status, status_watch) = watch::channel(Status::default());
        let handle = MemberHandle {
            requests: None,
            registry: registry_watch,
            status: status_watch,
            transport,
            config: Arc::new(config),
        };
        (Self { registry, status }, handle)
    }

    /// The member's registry. An older one than is shown already is ignored: nothing runs backwards.
    pub fn set_registry(&self, registry: Arc<Registry>) {
        self.registry.send_if_modified(|shown| {
            let newer = registry.index > shown.index;
            if newer {
                *shown = registry;
            }
            newer
        });
    }

    /// Where the member stands.
    pub fn set_status(&self, status: Status) {
        // The member follows for all replicas.
        self.status.send_replace(Status { wants_follow: false, ..status });
    }
}
