//! Runs seeded federations: `federation-sim --seeds 1000`, or `--seed N` to replay one.

use std::process::ExitCode;
use std::time::Instant;

use isthmus_federation::sim::{self, Mutation};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |flag: &str| {
        let at = args.iter().position(|arg| arg == flag)?;
        args.get(at + 1).and_then(|value| value.parse::<u64>().ok())
    };
    if args.is_empty() || args.iter().any(|arg| arg == "--help" || arg == "-h") {
        println!("usage: federation-sim --seeds COUNT [--from SEED] | --seed SEED");
        return ExitCode::SUCCESS;
    }
    let (from, count) = match number("--seed") {
        Some(seed) => (seed, 1),
        None => (number("--from").unwrap_or(0), number("--seeds").unwrap_or(1000)),
    };
    let started = Instant::now();
    let mut total = sim::Report::default();
    for seed in from..from + count {
        match sim::run(seed, Mutation::None) {
            Ok(report) => {
                if count == 1 {
                    println!("{report:#?}");
                }
                total.events += report.events;
                total.acknowledged += report.acknowledged;
                total.faults += report.faults;
                total.leaders += report.leaders;
                total.group_changes += report.group_changes;
                total.joins += report.joins;
            }
            Err(violation) => {
                eprintln!("FAILED {violation}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!(
        "{count} seeds held in {:.1} s: {} events, {} acknowledged writes, {} faults, {} leaders, {} group changes, {} joins",
        started.elapsed().as_secs_f64(),
        total.events,
        total.acknowledged,
        total.faults,
        total.leaders,
        total.group_changes,
        total.joins,
    );
    ExitCode::SUCCESS
}
