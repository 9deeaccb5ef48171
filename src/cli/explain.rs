//! `wora explain LAYER`: one forward and backward, line by line, with its numbers.

use super::{Outcome, print};
use crate::case::Case;
use crate::explain::{Explanation, Shape, drawn, examples};
use crate::gradcheck::Verdict;
use crate::oracle::case_file;
use crate::registry::{names, specs};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Walk through one forward and backward: every line of SPEC.md with its formula, shapes and numbers, the identities with
/// both sides, and every gradient beside its difference
#[derive(clap::Args)]
pub struct Args {
    /// A layer (its worked example in SPEC.md), a case of `wora check --list`, or a case file
    layer: String,
    /// The gradient through the norm (of a layer: the one with the norm held where this is not given)
    #[arg(long)]
    full: bool,
    /// Random numbers from this seed, instead of the example's
    #[arg(long)]
    seed: Option<u64>,
    /// Shapes of x and of the base weight as stored, and the rank, such as 2x4 3x4 1; the numbers are random
    #[arg(long, num_args = 3, value_names = ["X", "WEIGHT", "RANK"])]
    shape: Option<Vec<String>>,
    /// Write it as a page of HTML instead
    #[arg(long, value_name = "OUT.html")]
    html: Option<PathBuf>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let case = chosen(&args)?;
    let explanation = Explanation::of(&case).map_err(|error| match is_case_file(&args.layer) {
        true => error.in_file(Path::new(&args.layer)),
        false => error,
    })?;
    if let Some(path) = &args.html {
        explanation.page().write(path)?;
    }
    if args.json {
        print(&serde_json::to_string(&explanation).expect("plain data"))?;
    } else if args.html.is_none() {
        print(explanation.to_string().trim_end())?;
    }
    let holds = explanation.identities.iter().all(|identity| identity.verdict == Verdict::Agree);
    Ok(if holds { Outcome::Good } else { Outcome::Wrong })
}

/// The case that is meant by the words of the command line.
fn chosen(args: &Args) -> Result<Case> {
    let (name, seed) = (&args.layer, args.seed.unwrap_or(0));
    if let Some(example) = examples().into_iter().find(|example| example.layer() == name) {
        let case = match (&args.shape, args.seed) {
            (None, None) => example.case()?,
            (shape, _) => drawn(&example, shape.as_deref().map(shape_of).transpose()?, seed)?,
        };
        return Ok(with_norm_gradient(case, if args.full { "full" } else { "detached" }));
    }
    if args.shape.is_some() {
        return Err(Error::Unknown { what: "layer for --shape", expected: names(), found: name.clone() });
    }
    let as_asked = |case| if args.full { with_norm_gradient(case, "full") } else { case };
    if let Some((layer, spec)) = specs().find(|(_, spec)| spec.name == name) {
        return layer.try_draw(spec, seed).map(as_asked);
    }
    if is_case_file(name) {
        if let Some(seed) = args.seed {
            let expected = "none, as a case file has its own numbers".into();
            return Err(Error::Setting { name: "--seed", expected, found: seed.to_string() });
        }
        return Ok(as_asked(case_file::read(Path::new(name))?.case));
    }
    let expected = format!("{}, a case of a layer (wora check --list), or a case file", names());
    Err(Error::Unknown { what: "LAYER", expected, found: name.clone() })
}

/// Whether what is asked for is a file, and no name.
fn is_case_file(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "safetensors")
}

fn with_norm_gradient(mut case: Case, norm_gradient: &str) -> Case {
    case.settings.insert("norm_gradient".into(), norm_gradient.into());
    case
}

/// `2x4`, `3x4` and `1`.
fn shape_of(words: &[String]) -> Result<Shape> {
    let lengths = |word: &String| -> Result<Vec<usize>> {
        let parsed: std::result::Result<_, _> = word.split('x').map(str::parse).collect();
        parsed.map_err(|_| {
            let expected = "three shapes, such as 2x4 3x4 1".into();
            Error::Setting { name: "--shape", expected, found: word.clone() }
        })
    };
    let [x, weight, rank] = [lengths(&words[0])?, lengths(&words[1])?, lengths(&words[2])?];
    match rank[..] {
        [rank] => Ok(Shape { x, weight, rank }),
        _ => Err(Error::Setting { name: "--shape", expected: "a rank, such as 1".into(), found: words[2].clone() }),
    }
}
