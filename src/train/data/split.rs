//! Who is trained on, who is asked on the way, who is asked at the end; and in which order an epoch goes.

use super::Dataset;
use crate::{Error, Result};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};

/// The samples of each part, ascending.
///
/// ```
/// use std::path::Path;
/// use woracle::train::data::{Source, load, shuffled, split};
/// let digits = load(&Source::Digits.into(), Path::new("."), None)?;
/// let parts = split(&digits, 0.1, 0.2, 5)?;
/// assert_eq!(parts.train.len() + parts.validation.len() + parts.test.len(), 1797);
/// assert!(parts.test.iter().all(|sample| parts.train.binary_search(sample).is_err())); // nobody is in two parts
/// assert_eq!(split(&digits, 0.1, 0.2, 5)?, parts); // the same seed
/// let epoch = shuffled(&parts.train, 5, 0);
/// assert_ne!(epoch, shuffled(&parts.train, 5, 1)); // every epoch has another order
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Those that are trained on.
    pub train: Vec<usize>,
    /// Those that say when to stop.
    pub validation: Vec<usize>,
    /// Those that are asked once, at the end.
    pub test: Vec<usize>,
}

/// Divides a set at random; the same seed divides it the same way. The shares are those of the blocks, rounded.
///
/// # Errors
///
/// Shares that are not from 0 to below 1, or leave nothing to train on; a part with a share that gets no block; a set
/// whose `blocks` are not one a sample.
pub fn split(dataset: &Dataset, validation: f64, test: f64, seed: u64) -> Result<Split> {
    if dataset.blocks.len() != dataset.len() {
        let expected = format!("[{}]", dataset.len());
        return Err(Error::Shape { tensor: "blocks".into(), expected, found: vec![dataset.blocks.len()] });
    }
    let mut blocks = dataset.blocks.clone();
    blocks.sort_unstable();
    blocks.dedup();
    let count_of = |name: &'static str, share: f64| {
        let refuse = |expected| Error::Setting { name, expected, found: share.to_string() };
        if !(0.0..1.0).contains(&share) {
            return Err(refuse("a share from 0 to below 1".into()));
        }
        match (share * blocks.len() as f64).round() as usize {
            0 if share > 0.0 => Err(refuse(format!("0, or a share that comes to one of {} blocks", blocks.len()))),
            count => Ok(count),
        }
    };
    let (in_validation, in_test) = (count_of("validation", validation)?, count_of("test", test)?);
    if validation + test >= 1.0 || in_validation + in_test >= blocks.len() {
        return Err(Error::Setting {
            name: "validation + test",
            expected: format!("shares that leave one of {} blocks to train on", blocks.len()),
            found: format!("{validation} + {test}"),
        });
    }
    shuffle(&mut blocks, &mut Pcg64::seed_from_u64(seed));
    let (held_out, _) = blocks.split_at_mut(in_validation + in_test);
    let (for_validation, for_test) = held_out.split_at_mut(in_validation);
    for_validation.sort_unstable();
    for_test.sort_unstable();

    let mut split = Split { train: vec![], validation: vec![], test: vec![] };
    for (sample, block) in dataset.blocks.iter().enumerate() {
        let is_in = |blocks: &[usize]| blocks.binary_search(block).is_ok();
        let part = match () {
            () if is_in(for_validation) => &mut split.validation,
            () if is_in(for_test) => &mut split.test,
            () => &mut split.train,
        };
        part.push(sample);
    }
    Ok(split)
}

/// The samples in the order of an epoch: every epoch has another, and the same seed has the same ones.
pub fn shuffled(samples: &[usize], seed: u64, epoch: u64) -> Vec<usize> {
    // An odd factor keeps the seeds of the epochs apart, and all of them apart from that of the split.
    let seed = seed.wrapping_add(epoch.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut samples = samples.to_vec();
    shuffle(&mut samples, &mut Pcg64::seed_from_u64(seed));
    samples
}

/// Fisher and Yates: every order is as likely as every other.
fn shuffle(items: &mut [usize], random: &mut Pcg64) {
    for last in (1..items.len()).rev() {
        items.swap(last, below(last as u64 + 1, random) as usize);
    }
}

/// A number below `bound`, each as likely: D. Lemire, "Fast Random Integer Generation in an Interval", 2019. Not the
/// generator's own method, whose numbers may change with its version and with the width of a machine's words.
fn below(bound: u64, random: &mut Pcg64) -> u64 {
    let surplus = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(random.next_u64()) * u128::from(bound);
        if product as u64 >= surplus {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::{Features, Targets};
    use ndarray::ArrayD;

    fn set(blocks: Vec<usize>) -> Dataset {
        let features = Features::Ids(ArrayD::zeros(vec![blocks.len(), 1]));
        let targets = Targets::Classes(ArrayD::zeros(vec![blocks.len()]));
        Dataset { features, targets, classes: Some(1), blocks }
    }

    #[test]
    fn every_sample_is_in_one_part_and_no_block_in_two() {
        let set = set((0..1000).map(|sample| sample / 7).collect());
        let parts = split(&set, 0.2, 0.1, 3).unwrap();
        let mut all = [&parts.train[..], &parts.validation, &parts.test].concat();
        assert!([&parts.train, &parts.validation, &parts.test].iter().all(|part| part.is_sorted()));
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        let blocks = |part: &[usize]| {
            let mut blocks: Vec<_> = part.iter().map(|&sample| set.blocks[sample]).collect();
            blocks.dedup();
            blocks
        };
        let (train, validation, test) = (blocks(&parts.train), blocks(&parts.validation), blocks(&parts.test));
        assert_eq!((train.len(), validation.len(), test.len()), (143 - 29 - 14, 29, 14));
        assert!(validation.iter().all(|block| !train.contains(block) && !test.contains(block)));
        assert!(test.iter().all(|block| !train.contains(block)));
    }

    #[test]
    fn a_seed_divides_the_same_way_and_another_does_not() {
        let set = set((0..50).collect());
        assert_eq!(split(&set, 0.2, 0.2, 1).unwrap(), split(&set, 0.2, 0.2, 1).unwrap());
        assert_ne!(split(&set, 0.2, 0.2, 1).unwrap(), split(&set, 0.2, 0.2, 2).unwrap());
        let whole = split(&set, 0.0, 0.0, 1).unwrap();
        assert_eq!((whole.train.len(), whole.validation.len(), whole.test.len()), (50, 0, 0));
    }

    #[test]
    fn shares_that_leave_a_part_empty_are_refused() {
        let refused =
            |count, validation, test| split(&set((0..count).collect()), validation, test, 0).unwrap_err().to_string();
        for (count, validation, test, expected) in [
            (10, -0.1, 0.0, "setting validation: expected a share from 0 to below 1, found -0.1"),
            (10, 0.0, f64::NAN, "setting test: expected a share from 0 to below 1, found NaN"),
            (10, 1.0, 0.0, "setting validation: expected a share from 0 to below 1, found 1"),
            (
                10,
                0.5,
                0.5,
                "setting validation + test: expected shares that leave one of 10 blocks to train on, found 0.5 + 0.5",
            ),
            (10, 0.01, 0.0, "setting validation: expected 0, or a share that comes to one of 10 blocks, found 0.01"),
            (
                2,
                0.45,
                0.45,
                "setting validation + test: expected shares that leave one of 2 blocks to train on, found 0.45 + 0.45",
            ),
            (
                0,
                0.0,
                0.0,
                "setting validation + test: expected shares that leave one of 0 blocks to train on, found 0 + 0",
            ),
        ] {
            assert_eq!(refused(count, validation, test), expected);
        }
        let wrong = Dataset { blocks: vec![0], ..set(vec![0, 1]) };
        assert_eq!(split(&wrong, 0.0, 0.0, 0).unwrap_err().to_string(), "blocks: expected shape [2], found [1]");
    }

    #[test]
    fn an_epoch_is_an_order_of_the_same_samples() {
        let samples: Vec<usize> = (10..40).collect();
        let (first, second) = (shuffled(&samples, 7, 0), shuffled(&samples, 7, 1));
        assert_eq!(first, shuffled(&samples, 7, 0));
        assert_ne!(first, second);
        let mut sorted = second;
        sorted.sort_unstable();
        assert_eq!(sorted, samples);
        assert!(shuffled(&[], 0, 0).is_empty());
    }

    #[test]
    fn every_order_is_as_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts.entry(shuffled(&[0, 1, 2], 0, epoch)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
