//! The sample service as a program of its own, for the stories.

fn main() -> anyhow::Result<()> {
    isthmus_lab::sample::main(std::env::args().skip(1))
}
