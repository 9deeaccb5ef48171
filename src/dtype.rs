//! The types that a case file's numbers are stored in, and rounding to them.

use crate::operators::PARALLEL_ELEMENTS;
use crate::wora::Storage;
use half::{bf16, f16};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A floating-point type of safetensors, by its name there.
///
/// ```
/// use woracle::oracle::Dtype;
/// assert_eq!(Dtype::Bf16.round(1.0 + 1.0 / 256.0), 1.0); // a tie goes to the even neighbour
/// assert_eq!(Dtype::F16.round(1e6), f64::INFINITY);
/// ```
///
/// ```
/// use woracle::oracle::Dtype;
/// assert_eq!("bf16".parse(), Ok(Dtype::Bf16));
/// assert_eq!(Dtype::Bf16.unit_roundoff(), 1.0 / 256.0); // half the distance from 1 to the next number
/// assert_eq!(Dtype::Bf16.ulp(4.5), 1.0 / 32.0);
/// assert_eq!(Dtype::F16.smallest_subnormal(), 2f64.powi(-24));
/// assert!(Dtype::F32.storage().chain > 0 && Dtype::F16.storage().chain == 0); // f16 is summed in f32
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Dtype {
    /// 53 digits.
    F64,
    /// 24 digits.
    F32,
    /// 8 digits, the range of F32.
    Bf16,
    /// 11 digits, up to 65504.
    F16,
}

impl Dtype {
    /// Every type.
    pub const ALL: [Self; 4] = [Self::F64, Self::F32, Self::Bf16, Self::F16];

    /// Binary digits of a normal number.
    const fn digits(self) -> i32 {
        match self {
            Self::F64 => 53,
            Self::F32 => 24,
            Self::Bf16 => 8,
            Self::F16 => 11,
        }
    }

    /// The exponent of the smallest normal number.
    const fn least_exponent(self) -> i32 {
        match self {
            Self::F64 => -1022,
            Self::F32 | Self::Bf16 => -126,
            Self::F16 => -14,
        }
    }

    /// The largest relative error of one rounding of a normal number.
    pub fn unit_roundoff(self) -> f64 {
        power_of_two(-self.digits())
    }

    /// The distance between neighbours at a number.
    pub fn ulp(self, value: f64) -> f64 {
        self.spacing().at(value)
    }

    /// The same for many numbers.
    pub(crate) fn spacing(self) -> Spacing {
        Spacing { smallest_normal: power_of_two(self.least_exponent()), last_place: power_of_two(1 - self.digits()) }
    }

    /// The distance between the numbers nearest to 0.
    pub fn smallest_subnormal(self) -> f64 {
        self.ulp(0.0)
    }

    /// The nearest number of this type, the even one of two; an infinity beyond the largest.
    pub fn round(self, value: f64) -> f64 {
        let beyond = match self {
            Self::F64 => return value,
            Self::F32 | Self::Bf16 => power_of_two(128),
            Self::F16 => power_of_two(16),
        };
        if value == 0.0 || value.is_nan() {
            return value;
        }
        if value.abs() >= beyond {
            return f64::INFINITY.copysign(value);
        }
        let quantum = self.ulp(value);
        let rounded = (value / quantum).round_ties_even() * quantum;
        if rounded.abs() < beyond { rounded } else { f64::INFINITY.copysign(value) }
    }

    /// What storing intermediates in this type does to results. Half the types are multiplied with sums kept in F32.
    pub fn storage(self) -> Storage {
        let chain = match self {
            Self::F64 => usize::MAX,
            Self::F32 => 512,
            Self::Bf16 | Self::F16 => 0,
        };
        let total_chain = if self == Self::F64 { usize::MAX } else { 0 };
        Storage { smallest_normal: power_of_two(self.least_exponent()), chain, total_chain }
    }

    /// The type that numbers of this kind are stored in without loss.
    pub(crate) fn of_scalar<T: crate::Scalar>() -> Self {
        if T::NAME == "f32" { Self::F32 } else { Self::F64 }
    }

    /// The one that a file calls this; `None` for a type that is none of these.
    pub(crate) fn of(stored: safetensors::Dtype) -> Option<Self> {
        Self::ALL.into_iter().find(|&dtype| safetensors::Dtype::from(dtype) == stored)
    }

    /// The little-endian bytes of the nearest numbers.
    pub(crate) fn encode(self, values: &[f64]) -> Vec<u8> {
        fn all<const N: usize>(values: &[f64], encode: impl Fn(f64) -> [u8; N] + Sync) -> Vec<u8> {
            let mut bytes = vec![0; N * values.len()];
            let (chunks, _) = bytes.as_chunks_mut::<N>();
            chunks
                .par_iter_mut()
                .zip(values)
                .with_min_len(PARALLEL_ELEMENTS)
                .for_each(|(bytes, &v)| *bytes = encode(v));
            bytes
        }
        match self {
            Self::F64 => all(values, f64::to_le_bytes),
            Self::F32 => all(values, |value| (value as f32).to_le_bytes()),
            Self::Bf16 => all(values, |value| bf16::from_f64(self.round(value)).to_le_bytes()),
            Self::F16 => all(values, |value| f16::from_f64(self.round(value)).to_le_bytes()),
        }
    }

    /// The numbers of little-endian bytes.
    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f64> {
        fn all<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> f64 + Sync) -> Vec<f64> {
            let (chunks, _) = bytes.as_chunks::<N>();
            chunks.par_iter().with_min_len(PARALLEL_ELEMENTS).map(|&bytes| decode(bytes)).collect()
        }
        match self {
            Self::F64 => all(bytes, f64::from_le_bytes),
            Self::F32 => all(bytes, |bytes| f32::from_le_bytes(bytes).into()),
            Self::Bf16 => all(bytes, |bytes| bf16::from_le_bytes(bytes).to_f64()),
            Self::F16 => all(bytes, |bytes| f16::from_le_bytes(bytes).to_f64()),
        }
    }
}

/// How far apart the numbers of a type are.
#[derive(Clone, Copy)]
pub(crate) struct Spacing {
    smallest_normal: f64,
    /// Of 1.
    last_place: f64,
}

impl Spacing {
    #[inline(always)]
    pub fn at(self, value: f64) -> f64 {
        // The power of two that a number has in it; infinite for what is no finite number.
        let power = f64::from_bits(value.to_bits() & 0x7ff0_0000_0000_0000);
        let normal = self.smallest_normal < power && power < f64::INFINITY;
        if normal { power * self.last_place } else { self.smallest_normal * self.last_place }
    }
}

/// `2^exponent`, from the smallest subnormal f64 up.
fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(if exponent < -1022 { 1 << (exponent + 1074) } else { ((exponent + 1023) as u64) << 52 })
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

impl std::str::FromStr for Dtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|dtype| dtype.to_string() == text);
        named.ok_or_else(|| "expected f64, f32, bf16 or f16".into())
    }
}

impl From<Dtype> for safetensors::Dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F64 => Self::F64,
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
        }
    }
}
