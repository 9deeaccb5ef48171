//! The diagnosis: every mistake of the bank, made in every case where it can be, must be named first.

use rayon::prelude::*;
use woracle::case::Tensor;
use woracle::cases::{Spec, Twist};
use woracle::mistakes::{MISTAKES, Mistake};
use woracle::oracle::diagnose::diagnose;
use woracle::oracle::{CaseFile, Dtype};
use woracle::registry::{LAYERS, Subject, mistaken};

const SEED: u64 = 11;

/// The case with these mistakes in it, its numbers rounded to a type; `None` where they cannot be made.
fn wrong(subject: &dyn Subject, spec: &Spec, mistakes: &[&Mistake], dtype: Dtype) -> Option<CaseFile> {
    let mut case = subject.draw(spec, SEED);
    for tensor in case.tensors.values_mut() {
        if let Tensor::Float(values) = tensor {
            values.mapv_inplace(|value| dtype.round(value));
        }
    }
    let theirs = mistaken(subject, mistakes, &case).ok()??;
    let answers = theirs.into_iter().filter(|(name, _)| name == "y" || name.starts_with("grad."));
    case.tensors.extend(answers.map(|(name, values)| (name, Tensor::Float(values.mapv(|value| dtype.round(value))))));
    Some(CaseFile::new(case, dtype))
}

/// What came of all pairs of a mistake and a case: how many were rejected, named first, tied for the first place, and
/// the others.
#[derive(Default)]
struct Score {
    accepted: usize,
    first: usize,
    tied: usize,
    missed: Vec<String>,
}

/// Every `stride`-th of all pairs of a mistake and a small case.
fn score(dtype: Dtype, stride: usize) -> Score {
    // Weights of 2^-80 are nothing in f16.
    let small = |spec: &&Spec| !spec.name.contains("large") && (dtype != Dtype::F16 || spec.twist != Twist::Tiny);
    let all: Vec<_> = MISTAKES
        .iter()
        .flat_map(|mistake| {
            LAYERS.iter().filter(|layer| mistake.layers.contains(&layer.name())).map(move |layer| (mistake, layer))
        })
        .flat_map(|(mistake, layer)| layer.specs().iter().filter(small).map(move |spec| (mistake, *layer, spec)))
        .step_by(stride)
        .collect();
    let each: Vec<Score> = all
        .into_par_iter()
        .filter_map(|(mistake, layer, spec)| {
            let file = wrong(layer, spec, &[mistake], dtype)?;
            let diagnosis = diagnose(&file).expect("a diagnosis");
            let mut score = Score::default();
            if diagnosis.first_diverging.is_none() {
                score.accepted = 1;
                return Some(score);
            }
            let of = |id: &str| diagnosis.candidates.iter().find(|candidate| candidate.ids == [id]);
            let best = diagnosis.candidates.first();
            match (best, of(mistake.id)) {
                (Some(best), Some(_)) if best.ids == [mistake.id] => score.first = 1,
                (Some(best), Some(mine)) if best.residual == mine.residual => score.tied = 1,
                (best, _) => {
                    let instead = best.map_or("nothing", |best| best.id.as_str());
                    score.missed.push(format!("{dtype} {} in {}: {instead}", mistake.id, spec.name));
                }
            }
            Some(score)
        })
        .collect();
    each.into_iter().fold(Score::default(), |mut sum, one| {
        sum.accepted += one.accepted;
        sum.first += one.first;
        sum.tied += one.tied;
        sum.missed.extend(one.missed);
        sum
    })
}

#[test]
fn every_mistake_is_named_first_or_tied_with_what_cannot_be_told_from_it() {
    for dtype in Dtype::ALL {
        let Score { accepted, first, tied, missed } = score(dtype, 13);
        let rejected = first + tied + missed.len();
        println!(
            "{dtype}: {rejected} rejected, {first} named first, {tied} tied with the first, {} missed; {accepted} make no difference that shows",
            missed.len()
        );
        println!("  {}", missed.iter().take(20).cloned().collect::<Vec<_>>().join("\n  "));
        assert!(first * 100 >= 95 * rejected, "{dtype}");
        assert!((first + tied) * 1000 >= 995 * rejected, "{dtype}");
    }
}
