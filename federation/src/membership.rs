//! Who votes: decided by the leader from what it knows, one change at a time.
//!
//! Pure. Rules: one voter until a third cluster has caught up, then 3, then 5; never an even number
//! outside a joint change; distinct regions and providers first; a voter that is silent for 10 minutes is
//! replaced by a learner that has caught up. A cluster that left the registry leaves the group.

use std::collections::BTreeSet;

/// Voters at most: more make every write wait for more clouds and survive hardly more failures.
pub const VOTERS_MAX: usize = 5;
/// Learners beside the voters at full size: the one that replaces a lost voter at once.
pub const SPARES: usize = 1;
/// A voter or learner not heard from for this long is replaced.
pub const SILENT_MS_MAX: u64 = 10 * 60 * 1000;

/// A cluster that may take part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its Raft id, which is its number.
    pub id: u64,
    /// Its region; empty if unknown.
    pub region: String,
    /// Its cloud; empty if unknown.
    pub provider: String,
    /// Whether it was heard from lately, and its log reaches nearly the leader's commit.
    pub caught_up: bool,
    /// How long the leader has not heard from it.
    pub silent_ms: u64,
}

/// The group as it is, not joint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Group {
    /// With a vote.
    pub voters: BTreeSet<u64>,
    /// Without.
    pub learners: BTreeSet<u64>,
    /// Who asks.
    pub leader: u64,
}

/// One change of the group; joint if it moves more than one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// Become voters.
    pub promote: Vec<u64>,
    /// Become learners.
    pub learn: Vec<u64>,
    /// Leave the group.
    pub remove: Vec<u64>,
}

/// The next change, if any is due. `clusters` are the members of the mesh, the leader among them.
pub fn next(group: &Group, clusters: &[Candidate]) -> Option<Change> {
    propose(group, clusters).filter(|change| lives(group, change, clusters))
}

/// Whether a majority of the voters after `change` is there: a joint change into a group that cannot
/// answer would never end, and nobody could undo it.
fn lives(group: &Group, change: &Change, clusters: &[Candidate]) -> bool {
    let mut voters = group.voters.clone();
    voters.extend(&change.promote);
    voters.retain(|id| !change.learn.contains(id) && !change.remove.contains(id));
    let there = |id: &&u64| clusters.iter().any(|c| c.id == **id && c.caught_up);
    voters == group.voters || voters.iter().filter(there).count() * 2 > voters.len()
}

fn propose(group: &Group, clusters: &[Candidate]) -> Option<Change> {
    let find = |id: &u64| clusters.iter().find(|candidate| candidate.id == *id);
    let learners_gone: Vec<u64> = group.learners.iter().copied().filter(|id| find(id).is_none()).collect();
    if let Some(id) = learners_gone.first() {
        return Some(Change { remove: vec![*id], ..Change::default() });
    }
    let voters_gone: BTreeSet<u64> = group.voters.iter().copied().filter(|id| find(id).is_none()).collect();
    if !voters_gone.is_empty() {
        return Some(without(group, clusters, &voters_gone));
    }
    replace_silent(group, clusters)
        .or_else(|| grow(group, clusters))
        .or_else(|| swap_learner(group, clusters))
        .or_else(|| add_learner(group, clusters))
}

/// Removes voters whose clusters are gone; fills their places, or falls back to the next odd number.
fn without(group: &Group, clusters: &[Candidate], gone: &BTreeSet<u64>) -> Change {
    let mut stay: BTreeSet<u64> = group.voters.difference(gone).copied().collect();
    let mut change = Change { remove: gone.iter().copied().collect(), ..Change::default() };
    while stay.len() < group.voters.len() {
        let Some(id) = best(ready(group, clusters, &change), &stay, clusters) else { break };
        stay.insert(id);
        change.promote.push(id);
    }
    if !stay.is_empty() && stay.len().is_multiple_of(2) {
        // One too many for an odd number: the last promoted, else the voter that was silent the longest.
        let silence = |id: &u64| clusters.iter().find(|c| c.id == *id).map_or(u64::MAX, |c| c.silent_ms);
        let spare = match change.promote.pop() {
            Some(id) => Some(id),
            None => stay.iter().copied().filter(|id| *id != group.leader).max_by_key(|id| (silence(id), *id)),
        };
        if let Some(id) = spare.filter(|id| group.voters.contains(id)) {
            change.learn.push(id);
        }
    }
    change
}

fn replace_silent(group: &Group, clusters: &[Candidate]) -> Option<Change> {
    let silent = clusters
        .iter()
        .filter(|c| group.voters.contains(&c.id) && c.id != group.leader && c.silent_ms >= SILENT_MS_MAX)
        .max_by_key(|c| (c.silent_ms, c.id))?;
    let mut stay = group.voters.clone();
    stay.remove(&silent.id);
    let id = best(ready(group, clusters, &Change::default()), &stay, clusters)?;
    Some(Change { promote: vec![id], learn: vec![silent.id], remove: Vec::new() })
}

/// Two more voters, once two learners are ready.
fn grow(group: &Group, clusters: &[Candidate]) -> Option<Change> {
    if group.voters.len() >= VOTERS_MAX {
        return None;
    }
    let wanted = if group.voters.len().is_multiple_of(2) { 1 } else { 2 };
    let mut change = Change::default();
    let mut voters = group.voters.clone();
    for _ in 0..wanted {
        let id = best(ready(group, clusters, &change), &voters, clusters)?;
        voters.insert(id);
        change.promote.push(id);
    }
    Some(change)
}

/// A learner that is silent makes room for a cluster outside the group.
fn swap_learner(group: &Group, clusters: &[Candidate]) -> Option<Change> {
    let outside = |c: &&Candidate| !group.voters.contains(&c.id) && !group.learners.contains(&c.id);
    clusters.iter().find(outside)?;
    let silent = clusters.iter().find(|c| group.learners.contains(&c.id) && c.silent_ms >= SILENT_MS_MAX)?;
    Some(Change { remove: vec![silent.id], ..Change::default() })
}

fn add_learner(group: &Group, clusters: &[Candidate]) -> Option<Change> {
    let members = group.voters.len() + group.learners.len();
    if members >= clusters.len().min(VOTERS_MAX + SPARES) {
        return None;
    }
    let outside = clusters
        .iter()
        .filter(|c| !group.voters.contains(&c.id) && !group.learners.contains(&c.id))
        .collect::<Vec<_>>();
    // One that was heard lately before one that was not: a learner that cannot be reached is no use.
    let heard: Vec<_> = outside.iter().copied().filter(|c| c.silent_ms < SILENT_MS_MAX).collect();
    let all: BTreeSet<u64> = group.voters.union(&group.learners).copied().collect();
    let id = best(if heard.is_empty() { outside } else { heard }, &all, clusters)?;
    Some(Change { learn: vec![id], ..Change::default() })
}

/// Learners that could vote now.
fn ready<'a>(group: &Group, clusters: &'a [Candidate], change: &Change) -> Vec<&'a Candidate> {
    let fits = |c: &&Candidate| {
        group.learners.contains(&c.id)
            && c.caught_up
            && c.silent_ms < SILENT_MS_MAX
            && !change.promote.contains(&c.id)
            && !change.remove.contains(&c.id)
    };
    clusters.iter().filter(fits).collect()
}

/// The one whose region, then cloud, is rarest among those chosen; then the smallest number.
fn best(from: Vec<&Candidate>, chosen: &BTreeSet<u64>, clusters: &[Candidate]) -> Option<u64> {
    let same = |candidate: &Candidate, part: fn(&Candidate) -> &str| {
        let like = |c: &&Candidate| chosen.contains(&c.id) && part(c) == part(candidate);
        clusters.iter().filter(like).count()
    };
    from.into_iter().min_by_key(|c| (same(c, |c| &c.region), same(c, |c| &c.provider), c.id)).map(|c| c.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(id: u64, region: &str, caught_up: bool) -> Candidate {
        let provider = region.split('-').next().unwrap_or_default().to_owned();
        Candidate { id, region: region.into(), provider, caught_up, silent_ms: 0 }
    }

    fn group(voters: &[u64], learners: &[u64]) -> Group {
        Group {
            voters: voters.iter().copied().collect(),
            learners: learners.iter().copied().collect(),
            leader: voters[0],
        }
    }

    /// Applies changes until none is due, with everyone caught up.
    fn settle(mut group: Group, clusters: &[Candidate]) -> Group {
        for _ in 0..50 {
            let Some(change) = next(&group, clusters) else { return group };
            for id in change.promote {
                group.learners.remove(&id);
                group.voters.insert(id);
            }
            for id in change.learn {
                group.voters.remove(&id);
                group.learners.insert(id);
            }
            for id in change.remove {
                group.voters.remove(&id);
                group.learners.remove(&id);
            }
            assert_eq!(group.voters.len() % 2, 1, "never an even number of voters: {group:?}");
        }
        panic!("never settles: {group:?}");
    }

    #[test]
    fn two_clusters_have_one_voter_and_the_second_learns() {
        let clusters = [cluster(1, "aws-eu", true), cluster(2, "gcp-us", true)];
        assert_eq!(settle(group(&[1], &[]), &clusters), group(&[1], &[2]));
    }

    #[test]
    fn the_third_caught_up_cluster_makes_three_voters() {
        let mut clusters = vec![cluster(1, "a", true), cluster(2, "b", true), cluster(3, "c", false)];
        assert_eq!(settle(group(&[1], &[]), &clusters).voters.len(), 1, "the third is still behind");
        clusters[2].caught_up = true;
        assert_eq!(settle(group(&[1], &[2, 3]), &clusters).voters.len(), 3);
    }

    #[test]
    fn growth_stops_at_five_voters_and_one_spare() {
        let clusters: Vec<_> = (1..=9).map(|id| cluster(id, "r", true)).collect();
        let settled = settle(group(&[1], &[]), &clusters);
        assert_eq!((settled.voters.len(), settled.learners.len()), (VOTERS_MAX, SPARES));
    }

    #[test]
    fn distinct_regions_come_first() {
        let clusters = [
            cluster(1, "aws-eu", true),
            cluster(2, "aws-eu", true),
            cluster(3, "aws-us", true),
            cluster(4, "gcp-us", true),
        ];
        assert_eq!(settle(group(&[1], &[2, 3, 4]), &clusters).voters, [1, 3, 4].into());
    }

    #[test]
    fn a_silent_voter_is_replaced_only_by_a_learner_that_is_ready() {
        let mut clusters: Vec<_> = (1..=4).map(|id| cluster(id, "r", true)).collect();
        clusters[2].silent_ms = SILENT_MS_MAX;
        clusters[3].caught_up = false;
        assert_eq!(next(&group(&[1, 2, 3], &[4]), &clusters), None);
        clusters[3].caught_up = true;
        let change = next(&group(&[1, 2, 3], &[4]), &clusters);
        assert_eq!(change, Some(Change { promote: vec![4], learn: vec![3], remove: vec![] }));
    }

    #[test]
    fn a_group_never_shrinks_to_voters_that_do_not_answer() {
        let mut clusters = [cluster(1, "a", false)];
        assert_eq!(next(&group(&[1, 2, 3], &[]), &clusters), None);
        clusters[0].caught_up = true;
        assert!(next(&group(&[1, 2, 3], &[]), &clusters).is_some());
    }

    #[test]
    fn a_cluster_that_left_leaves_the_group_without_an_even_number() {
        let clusters = [cluster(1, "a", true), cluster(2, "b", true)];
        let settled = settle(group(&[1, 2, 3], &[]), &clusters);
        assert_eq!(settled, group(&[1], &[2]));
        let clusters = [cluster(1, "a", true), cluster(2, "b", true), cluster(4, "d", true)];
        assert_eq!(settle(group(&[1, 2, 3], &[4]), &clusters).voters, [1, 2, 4].into());
    }
}
