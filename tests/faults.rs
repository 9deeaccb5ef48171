//! What may go wrong around a command: it is killed, the disk is full, the directory cannot be written, what it reads goes
//! away, somebody else writes into the same directory. Never half of a result, and one clear line or a clean resume.
//!
//! `WORA_KILLS=100 cargo test --test faults -- --nocapture` prints the table of kills.
#![cfg(unix)]

mod command;
#[path = "faults/work.rs"]
mod work;

use command::wora;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use woracle::aside::replace;
use woracle::oracle::golden::{Manifest, Options, cases};
use woracle::tensor_writer::{Planned, TensorWriter};
use work::{Attempt, Came, Ended, Work, raw, results};

const KILL: i32 = 9;

/// How many times each is tried.
fn times() -> usize {
    std::env::var("WORA_KILLS").map_or(8, |times| times.parse().expect("WORA_KILLS: a number"))
}

/// What kills came to.
#[derive(Default)]
struct Row {
    kills: usize,
    nowhere: usize,
    writing: usize,
    done: usize,
    left: usize,
    resumed: usize,
}

fn killed(work: &Work) -> Row {
    let (mut row, mut rng) = (Row::default(), Pcg64::seed_from_u64(11));
    for nth in 0.. {
        if row.kills == times() {
            break;
        }
        assert!(nth < 100 + 20 * times(), "{}: it ends before it is killed", work.name);
        let attempt = work.attempt();
        // Every other one is let come to where it writes, however long it takes to start.
        let mut child = if nth % 2 == 1 { writing(&attempt) } else { attempt.start(&[]) };
        std::thread::sleep(work.took.mul_f64(rng.random_range(0.0..1.0)));
        child.kill().unwrap();
        let ended = Ended::of(child);
        if ended.signal != Some(KILL) {
            assert!(ended.is_good(), "{}: {ended:?}", work.name);
            continue;
        }
        assert_eq!(ended.stderr, "", "{}", work.name);
        let (came, left, wrote) = (attempt.came(), attempt.left(), attempt.is_writing());
        row.kills += 1;
        row.left += usize::from(!left.is_empty());
        *match came {
            Came::ToTheEnd => &mut row.done,
            _ if wrote => &mut row.writing,
            _ => &mut row.nowhere,
        } += 1;
        let again = attempt.run(work.again);
        if came == Came::ToTheEnd && matches!(work.name, "merge" | "unmerge") {
            again.complains_of(&attempt.out());
        } else {
            assert!(again.is_good(), "{}: {again:?}", work.name);
        }
        assert!(attempt.results() == work.expected, "{}: another result than without a kill", work.name);
        assert!(attempt.left().is_subset(&left), "{}: more is left than a kill leaves", work.name);
        row.resumed += 1;
    }
    work.assert_inputs_are_as_they_were();
    row
}

#[test]
fn what_is_killed_at_any_moment_leaves_nothing_half_and_comes_to_the_same_bytes() {
    let works = [|| Work::train(0), || Work::merge("keep"), || Work::unmerge(), || Work::golden(1)];
    let rows = std::thread::scope(|scope| {
        let threads = works.map(|work| {
            scope.spawn(move || {
                let work = work();
                (work.name, killed(&work))
            })
        });
        threads.map(|thread| thread.join().unwrap())
    });
    println!(
        "command   kills   before writing   while writing   with the result there   left something   right bytes then"
    );
    for (name, Row { kills, nowhere, writing, done, left, resumed }) in rows {
        println!("{name:7} {kills:7} {nowhere:16} {writing:15} {done:23} {left:16} {resumed:18}");
        assert!(writing > 0, "{name} was never killed while it wrote");
    }
}

/// A disk with so many bytes left.
struct Full<W> {
    out: W,
    left: usize,
}

impl<W: Write> Write for Full<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            return Err(ErrorKind::StorageFull.into());
        }
        let count = self.out.write(&bytes[..bytes.len().min(self.left)])?;
        self.left -= count;
        Ok(count)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

fn write_tensors(out: impl Write) -> std::io::Result<()> {
    let planned = ["a", "b"].map(|name| Planned { name: name.into(), dtype: safetensors::Dtype::F32, shape: vec![5] });
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let mut writer = TensorWriter::new(out, &planned, &metadata)?;
    for _ in &planned {
        writer.write(&[1; 20])?;
    }
    writer.finish().map(drop)
}

#[test]
fn a_disk_that_is_full_at_any_byte_leaves_what_was_there() {
    let manifest = Manifest::new(
        Options::default(),
        vec![cases("linear-plain", Options::default()).unwrap().next().unwrap().unwrap().0],
    );
    let text = manifest.to_json();
    type Writes<'w> = &'w dyn Fn(&mut dyn Write) -> std::io::Result<()>;
    let writes: [(&str, Writes<'_>); 2] =
        [("model.safetensors", &|out| write_tensors(out)), ("manifest.json", &|out| out.write_all(text.as_bytes()))];
    let directory = tempfile::tempdir().unwrap();
    for (name, write) in writes {
        let path = directory.path().join(name);
        let mut whole = vec![];
        write(&mut whole).unwrap();
        for before in [None, Some("as it was")] {
            if let Some(before) = before {
                std::fs::write(&path, before).unwrap();
            }
            let there = raw(directory.path());
            for left in 0..whole.len() {
                let error = replace(&path, |out| write(&mut Full { out, left })).unwrap_err().to_string();
                assert!(error.contains(name), "{error}");
                assert!(raw(directory.path()) == there, "{name}, full after {left} bytes of {}", whole.len());
            }
            replace(&path, |out| write(&mut Full { out, left: whole.len() })).unwrap();
            assert!(std::fs::read(&path).unwrap() == whole);
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn a_limit_on_file_sizes_is_one_line_and_nothing_half_until_it_is_large_enough() {
    let works = [
        || Work::train(0),
        || Work::merge("keep"),
        Work::small_merge,
        Work::unmerge,
        || Work::golden(1),
        Work::compare,
    ];
    for work in works {
        let (work, mut rng) = (work(), Pcg64::seed_from_u64(19));
        let attempt = work.attempt();
        assert!(attempt.run(&[]).is_good(), "{}", work.name);
        let largest = raw(&attempt.out()).values().map(Vec::len).max().unwrap();
        // At its first byte, within its blocks, at its last.
        let within = (0..times()).map(|_| rng.random_range(1..largest));
        for bytes in [0, 1, largest - 1].into_iter().chain(within) {
            let attempt = work.attempt();
            let ended = attempt.run_limited(bytes);
            assert_eq!(attempt.left(), Default::default(), "{}, {bytes} bytes: nothing is left", work.name);
            ended.complains_of(attempt.directory.path());
            assert_ne!(attempt.came(), Came::ToTheEnd, "{}, {bytes} of {largest} bytes", work.name);
            // Where nothing has changed there is nothing to go on from.
            if attempt.came() == Came::Between {
                let again = attempt.run(work.again);
                assert!(again.is_good(), "{}, {bytes} bytes: {again:?}", work.name);
                assert!(attempt.results() == work.expected, "{}, {bytes} bytes: another result", work.name);
            }
        }
        // What a comparison removes again may be larger than what it leaves.
        let (attempt, enough) = (work.attempt(), 16 * largest);
        let ended = attempt.run_limited(enough);
        assert!(ended.is_good() && attempt.came() == Came::ToTheEnd, "{}, {enough} bytes: {ended:?}", work.name);
        work.assert_inputs_are_as_they_were();
    }
}

#[test]
fn a_full_standard_output_or_standard_error_is_exit_code_2_and_no_panic() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let out = out.to_str().unwrap();
    let case = format!("{out}/linear-plain.safetensors");
    let full = || Stdio::from(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let start = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wora"));
        command.args(arguments).stdout(full()).stderr(Stdio::piped());
        command
    };
    for arguments in [
        &["golden", out, "linear-plain", "--json"][..],
        &["verify", &case],
        &["verify", &case, "--junit"],
        &["check", "linear-plain", "--json"],
        &["check", "--list"],
        &["explain", "linear"],
    ] {
        let ended = Ended::of(start(arguments).spawn().unwrap());
        ended.complains_of("standard output".as_ref());
        let ended = Ended::of(start(arguments).stderr(full()).spawn().unwrap());
        assert_eq!((ended.code, ended.signal), (Some(2), None), "{arguments:?}");
    }
    assert_eq!(results(Path::new(out)).len(), 2, "what was written is there");
}

/// Where permissions hold: the command as this user, or where that is one for whom nothing is forbidden as another, who
/// gets a copy that can be reached.
struct Unprivileged {
    directory: tempfile::TempDir,
    user: Option<u32>,
}

impl Unprivileged {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_wora"), directory.path().join("wora")).unwrap();
        for name in ["wora", ""] {
            let path = directory.path().join(name);
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let is_root = std::fs::metadata(directory.path()).unwrap().uid() == 0;
        Self { directory, user: is_root.then_some(65534) }
    }

    fn run(&self, arguments: &[String]) -> Ended {
        let mut command = Command::new(self.directory.path().join("wora"));
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).current_dir("/");
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        Ended::of(command.spawn().unwrap())
    }
}

fn open_to_all(directory: &Path) {
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_directory_that_cannot_be_written_is_one_line_that_names_it() {
    let user = Unprivileged::new();
    let pages = ["report OUT/page.html --quick", "explain linear --html OUT/page.html"];
    let works = [Work::train(0), Work::compare(), Work::merge("keep"), Work::unmerge(), Work::golden(1)];
    let commands = works.iter().map(|work| {
        open_to_all(work.input().parent().unwrap());
        Box::new(|out: &Path| work.arguments(&work.input(), out)) as Box<dyn Fn(&Path) -> Vec<String>>
    });
    let of_page = |page: &'static str| {
        let arguments =
            move |out: &Path| page.split(' ').map(|word| word.replace("OUT", out.to_str().unwrap())).collect();
        Box::new(arguments) as Box<dyn Fn(&Path) -> Vec<String>>
    };
    for arguments in commands.chain(pages.map(of_page)) {
        let directory = tempfile::tempdir().unwrap();
        let parent = directory.path().join("parent");
        std::fs::create_dir_all(&parent).unwrap();
        open_to_all(directory.path());
        // In a directory of others, and where a directory would have to be made in one.
        for out in [parent.clone(), parent.join("out")] {
            std::fs::set_permissions(&parent, std::fs::Permissions::from_mode(0o555)).unwrap();
            let arguments = arguments(&out);
            let ended = user.run(&arguments);
            // A merge takes the place of an empty directory: it is that one's parent that must be writable.
            let names = if arguments[0].ends_with("merge") { out.parent().unwrap() } else { &out };
            ended.complains_of(names);
            std::fs::set_permissions(&parent, std::fs::Permissions::from_mode(0o755)).unwrap();
            assert_eq!(std::fs::read_dir(&parent).unwrap().count(), 0, "{arguments:?}: something was written");
        }
    }
    // That it can be written where it may, the test would not know otherwise.
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    for work in &works {
        let ended = user.run(&work.arguments(&work.input(), &directory.path().join(work.name)));
        assert!(ended.is_good(), "{}: {ended:?}", work.name);
    }
}

/// Copies the files of a directory.
fn copy(from: &Path, to: &Path) {
    for (name, bytes) in raw(from) {
        std::fs::create_dir_all(to.join(&name).parent().unwrap()).unwrap();
        std::fs::write(to.join(name), bytes).unwrap();
    }
}

/// Removes or truncates a file at random moments of a run.
fn without_an_input(work: &Work, file: &str, cut: impl Fn(&[u8], &mut Pcg64) -> usize) {
    let (mut rng, mut refused) = (Pcg64::seed_from_u64(13), 0);
    for nth in 0..times() {
        let (attempt, inputs) = (work.attempt(), tempfile::tempdir().unwrap());
        copy(&work.input(), inputs.path());
        let path = inputs.path().join(file);
        let bytes = std::fs::read(&path).unwrap();
        let spoil = |rng: &mut Pcg64| {
            if nth % 2 == 0 {
                std::fs::remove_file(&path).unwrap();
            } else {
                let length = cut(&bytes, rng);
                std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length as u64).unwrap();
            }
        };
        // The first two before anything: that a missing file matters is no accident of the moment.
        let child = if nth < 2 {
            spoil(&mut rng);
            attempt.command_on(inputs.path(), &[]).spawn().unwrap()
        } else {
            let child = attempt.command_on(inputs.path(), &[]).spawn().unwrap();
            // Much is read early.
            std::thread::sleep(work.took.mul_f64(rng.random_range(0.0_f64..1.0).powi(2)));
            spoil(&mut rng);
            child
        };
        let ended = Ended::of(child);
        assert_eq!(attempt.left(), Default::default(), "{}, {file}: nothing is left", work.name);
        if ended.is_good() {
            assert_eq!(attempt.came(), Came::ToTheEnd, "{}, {file}", work.name);
        } else {
            refused += 1;
            ended.complains_of(inputs.path());
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(ended.stderr.contains(name), "{}, {file}: {ended:?}", work.name);
            assert_eq!(attempt.came(), Came::Nowhere, "{}, {file}: {ended:?}", work.name);
        }
    }
    assert!(refused >= 2, "{}: {file} is not read", work.name);
}

#[test]
fn an_input_that_goes_away_or_ends_early_is_one_line_or_does_not_matter() {
    let anywhere = |bytes: &[u8], rng: &mut Pcg64| rng.random_range(0..bytes.len());
    let merge = Work::merge("keep");
    for file in ["base/part-1.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"] {
        without_an_input(&merge, file, anywhere);
    }
    let unmerge = Work::unmerge();
    for file in ["merged/wora_merge.safetensors", "merged/part-0.safetensors", "adapter/adapter_model.safetensors"] {
        without_an_input(&unmerge, file, anywhere);
    }
    // A table that ends between two lines is another table: within one it is none.
    let within = |bytes: &[u8], rng: &mut Pcg64| {
        let commas: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] == b',').collect();
        commas[rng.random_range(0..commas.len())]
    };
    without_an_input(&Work::train(0), "table.csv", within);
}

#[test]
fn a_case_that_goes_away_while_it_is_judged_is_one_line_or_does_not_matter() {
    let cases = Work::golden(1);
    let name = "linear-one-row.safetensors";
    let (mut rng, mut refused) = (Pcg64::seed_from_u64(17), 0);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    let started = std::time::Instant::now();
    std::fs::write(&path, &cases.expected[name]).unwrap();
    assert_eq!(wora(&["verify", path.to_str().unwrap()]).0, Some(0));
    let took = started.elapsed();
    for nth in 0..2 * times() {
        std::fs::write(&path, &cases.expected[name]).unwrap();
        let start = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_wora"));
            command.args(["verify"]).arg(&path).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let spoil = || match nth % 2 {
            0 => std::fs::remove_file(&path).unwrap(),
            _ => std::fs::write(&path, &cases.expected[name][..100]).unwrap(),
        };
        let child = if nth < 2 {
            spoil();
            start()
        } else {
            let child = start();
            std::thread::sleep(took.mul_f64(rng.random_range(0.0..1.0)));
            spoil();
            child
        };
        let ended = Ended::of(child);
        if !ended.is_good() {
            refused += 1;
            ended.complains_of(&path);
        }
    }
    assert!(refused >= 2, "it is not read");
}

/// Two at once, `apart` from each other, with other results: whose is there then.
fn two_at_once(one: &Work, other: &Work, apart: Duration) {
    assert!(one.expected != other.expected, "the two could not be told apart");
    let attempt = one.attempt();
    let first = attempt.start(&[]);
    std::thread::sleep(apart);
    let mut second = Command::new(env!("CARGO_BIN_EXE_wora"));
    second.args(other.arguments(&other.input(), &attempt.out())).env("RAYON_NUM_THREADS", "2");
    let second = second.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let (first, second) = (Ended::of(first), Ended::of(second));
    let found = attempt.results();
    let mut whole = false;
    for (ended, work) in [(&first, one), (&second, other)] {
        if ended.is_good() {
            whole |= found == work.expected;
        } else {
            ended.complains_of(&attempt.out());
            assert!(ended.stderr.contains(", found "), "{ended:?}");
        }
    }
    assert!(whole, "{}: no result of those that ended well: {first:?} {second:?}", one.name);
    assert_eq!(attempt.left(), Default::default(), "{}: nothing is left", one.name);
}

#[test]
fn of_two_runs_into_one_directory_one_is_whole_and_the_other_says_so() {
    let (merge, bf16) = (Work::merge("keep"), Work::merge("bf16"));
    // What unmerge makes is another model's than what merge makes: both take the name of a directory.
    let pairs = [
        (Work::train(0), Work::train(1)),
        (Work::golden(1), Work::golden(2)),
        (Work::unmerge(), Work::merge("bf16")),
        (merge, bf16),
    ];
    for (one, other) in &pairs {
        for part in 0..times() {
            two_at_once(one, other, one.took.mul_f64(part as f64 / times() as f64));
        }
    }
}

/// Sends a signal, unless it has ended.
fn signal(name: &str, child: &mut Child) {
    if child.try_wait().unwrap().is_none() {
        assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
    }
}

/// A run that has been let come to where it writes, unless it has ended.
fn writing(attempt: &Attempt<'_>) -> Child {
    let mut child = attempt.start(&[]);
    while !attempt.is_writing() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    child
}

/// A run that stands still, every thread of it; `None` where it ended before.
#[cfg(target_os = "linux")]
fn stopped(mut child: Child) -> Option<Child> {
    signal("-STOP", &mut child);
    let threads = Path::new("/proc").join(child.id().to_string()).join("task");
    loop {
        let states = std::fs::read_dir(&threads).into_iter().flatten().flatten().map(|thread| {
            let state = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // After the name in brackets.
            state.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'))
        });
        let states: Vec<bool> = states.collect();
        if !states.is_empty() && states.iter().all(|&is_stopped| is_stopped) {
            return Some(child);
        }
        if child.try_wait().unwrap().is_some() {
            return None;
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn while_a_run_writes_another_is_refused_and_disturbs_nothing() {
    for work in [Work::train(0), Work::compare(), Work::golden(1)] {
        // It stands still until the other has been refused; one that has ended before it stands proves nothing.
        let standing = (0..50).map(|_| work.attempt()).find_map(|attempt| {
            let child = stopped(writing(&attempt))?;
            Some((attempt, child))
        });
        let (attempt, mut child) = standing.expect("one that is stopped while it writes");
        let there = raw(&attempt.out());
        let ended = attempt.run(&[]);
        ended.complains_of(&attempt.out());
        assert!(ended.stderr.contains("expected no other run in this directory, found one"), "{ended:?}");
        assert!(raw(&attempt.out()) == there, "{}: what the first had written has changed", work.name);
        signal("-CONT", &mut child);
        let ended = Ended::of(child);
        assert!(ended.is_good(), "{}: {ended:?}", work.name);
        assert_eq!((attempt.came(), attempt.left()), (Came::ToTheEnd, Default::default()), "{}", work.name);
    }
}

#[test]
fn what_a_killed_run_leaves_lying_about_hinders_nobody() {
    for work in [Work::train(0), Work::compare(), Work::golden(1)] {
        let attempt = work.attempt();
        std::fs::create_dir_all(attempt.out().join(".wora-directory")).unwrap();
        std::fs::write(attempt.out().join(".wora-file"), "half").unwrap();
        std::fs::write(attempt.out().join(".wora-lock"), "").unwrap();
        let ended = attempt.run(&[]);
        assert!(ended.is_good(), "{}: {ended:?}", work.name);
        assert_eq!(attempt.came(), Came::ToTheEnd, "{}", work.name);
    }
}

#[test]
fn cases_whose_writing_is_interrupted_have_no_manifest_and_nothing_beside_them() {
    let work = Work::golden(1);
    // One that has ended before the signal comes says nothing.
    let interrupted = (0..50).map(|_| work.attempt()).find_map(|attempt| {
        let mut child = writing(&attempt);
        signal("-TERM", &mut child);
        let ended = Ended::of(child);
        (!ended.is_good()).then_some((attempt, ended))
    });
    let (attempt, ended) = interrupted.expect("one that the signal reaches");
    ended.complains_of(&attempt.out());
    assert!(ended.stderr.contains("interrupted"), "{ended:?}");
    assert_eq!((attempt.came(), attempt.left()), (Came::Between, Default::default()));
    assert!(attempt.run(&[]).is_good());
    assert_eq!(attempt.came(), Came::ToTheEnd);
}
