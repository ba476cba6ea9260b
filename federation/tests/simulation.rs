//! The simulation in small: a few dozen seeds, a replay, and proof that the oracle can see.
//!
//! `./check` runs a thousand seeds; `cargo run -p isthmus-federation --bin federation-sim -- --seeds N` any
//! number.

use isthmus_federation::sim::{Mutation, run};

#[test]
fn no_invariant_breaks_in_forty_eight_worlds() {
    let mut faults = 0;
    let mut elections = 0;
    for seed in 0..48 {
        let report = run(seed, Mutation::None).unwrap_or_else(|violation| panic!("{violation}"));
        assert!(report.acknowledged > 10, "seed {seed} hardly wrote anything: {report:?}");
        faults += report.faults;
        elections += report.leaders;
    }
    // A run that nothing disturbed proves nothing.
    assert!(faults > 480, "only {faults} faults in 48 worlds");
    assert!(elections > 96, "only {elections} leaders in 48 worlds");
}

#[test]
fn a_seed_replays_to_the_same_hash() {
    for seed in [3, 17, 4711] {
        assert_eq!(run(seed, Mutation::None), run(seed, Mutation::None), "seed {seed}");
    }
}

#[test]
fn sending_before_persisting_is_caught() {
    let caught = (0..60).find_map(|seed| run(seed, Mutation::SendBeforePersist).err());
    let violation = caught.expect("60 worlds on disks that lie, and no invariant broke");
    assert!(violation.to_string().contains("--seed"), "says how to replay: {violation}");
}

#[test]
fn believing_every_signature_is_caught() {
    let caught = (0..20).find_map(|seed| run(seed, Mutation::NoSignatures).err());
    let violation = caught.expect("20 worlds with forgers, and nobody saw them");
    assert!(violation.text.contains("single writer"), "{violation}");
}
