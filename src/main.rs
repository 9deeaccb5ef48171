//! The command `wora`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}
