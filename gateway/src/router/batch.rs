//! One received buffer, cut into datagrams and put together again by next hop.
//!
//! The kernel merges datagrams of different tunnels into one buffer when they share addresses and size. Neighbours
//! with the same next hop leave as one send again. Pure: the caller decides and sends.

use std::ops::Range;

/// Largest payload of one send with segmentation offload.
const SEND_LEN_MAX: usize = 65_507;

/// Calls `send` with runs of neighbouring datagrams of `buffer` (each `stride` long, the last maybe shorter) for
/// which `decide` gave the same hop; `None` sends nothing. A run holds at most `segments_max` datagrams.
pub fn regroup<H: Copy + PartialEq>(
    buffer: &[u8],
    stride: usize,
    segments_max: usize,
    mut decide: impl FnMut(&[u8]) -> Option<H>,
    mut send: impl FnMut(H, Range<usize>),
) {
    // An empty datagram has stride 0.
    let stride = stride.max(1);
    let mut run: Option<(H, Range<usize>)> = None;
    let mut start = 0;
    while start < buffer.len() {
        let end = (start + stride).min(buffer.len());
        let hop = decide(&buffer[start..end]);
        run = match (run.take(), hop) {
            (Some((of, range)), Some(hop)) if of == hop && fits(&range, end, stride, segments_max) => {
                Some((of, range.start..end))
            }
            (full, hop) => {
                if let Some((of, range)) = full {
                    send(of, range);
                }
                hop.map(|hop| (hop, start..end))
            }
        };
        start = end;
    }
    if let Some((of, range)) = run {
        send(of, range);
    }
}

fn fits(range: &Range<usize>, end: usize, stride: usize, segments_max: usize) -> bool {
    end - range.start <= SEND_LEN_MAX && (range.end - range.start) / stride < segments_max
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(buffer: &[u8], stride: usize, segments_max: usize) -> Vec<(u8, Range<usize>)> {
        let mut runs = Vec::new();
        // A datagram's first byte is its hop; 0 is dropped.
        let decide = |datagram: &[u8]| (datagram[0] != 0).then_some(datagram[0]);
        regroup(buffer, stride, segments_max, decide, |hop, range| runs.push((hop, range)));
        runs
    }

    #[test]
    fn neighbours_of_one_hop_leave_together_and_order_is_kept() {
        let buffer = [1, 1, 1, 1, 2, 2, 0, 0, 2, 2, 1];
        assert_eq!(runs(&buffer, 2, 64), [(1, 0..4), (2, 4..6), (2, 8..10), (1, 10..11)]);
    }

    #[test]
    fn a_short_last_datagram_ends_its_run() {
        assert_eq!(runs(&[1, 1, 1, 1, 1], 2, 64), [(1, 0..5)]);
    }

    #[test]
    fn a_run_is_no_longer_than_one_send_may_be() {
        assert_eq!(runs(&[1; 6], 2, 2), [(1, 0..4), (1, 4..6)]);
        let long = vec![1; 65_536];
        let ranges: Vec<_> = runs(&long, 1452, 64).into_iter().map(|(_, range)| range.len()).collect();
        assert!(ranges.iter().all(|length| *length <= SEND_LEN_MAX), "{ranges:?}");
        assert_eq!(ranges.iter().sum::<usize>(), 65_536);
    }

    #[test]
    fn without_offload_each_leaves_alone_and_nothing_is_nothing() {
        assert_eq!(runs(&[1, 1], 1, 1), [(1, 0..1), (1, 1..2)]);
        assert_eq!(runs(&[], 0, 64), []);
    }
}
