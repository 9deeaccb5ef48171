//! The command `wora`.

fn main() -> std::process::ExitCode {
    woracle::cli::run()
}
