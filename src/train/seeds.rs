//! What is drawn for one purpose has nothing to do with what is drawn for another.

/// A seed for a purpose, of a run's seed and of counts.
pub(super) fn seed_of(purpose: &str, seed: u64, counts: &[u64]) -> u64 {
    let named = purpose.bytes().map(u64::from);
    named.chain([seed]).chain(counts.iter().copied()).fold(0xcbf2_9ce4_8422_2325, |hash: u64, next| {
        // The finisher of SplitMix64: every bit of what goes in changes half of what comes out.
        let mut mixed = (hash ^ next).wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}
