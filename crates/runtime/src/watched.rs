//! What one task keeps and others watch.

use tokio::sync::watch;

/// Replaces what is watched; watchers wake only if it differs.
pub fn replace<T: PartialEq>(sender: &watch::Sender<T>, value: T) {
    sender.send_if_modified(|current| {
        let differs = *current != value;
        *current = value;
        differs
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_value_wakes_watchers() {
        let sender = watch::Sender::new(1);
        let watcher = sender.subscribe();
        replace(&sender, 1);
        assert!(!watcher.has_changed().expect("the sender lives"));
        replace(&sender, 2);
        assert!(watcher.has_changed().expect("the sender lives"));
        assert_eq!(*watcher.borrow(), 2);
    }
}
