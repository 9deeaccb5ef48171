//! The command `wora`, run as a user would.

use assert_cmd::Command;

/// Runs it on this many threads: its exit code, what it prints and what it complains of.
pub fn wora_on(threads: usize, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wora"));
    let output = command.env("RAYON_NUM_THREADS", threads.to_string()).args(arguments).output().expect("a run");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Runs it on two threads.
pub fn wora(arguments: &[&str]) -> (Option<i32>, String, String) {
    wora_on(2, arguments)
}
