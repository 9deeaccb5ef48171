//! The list of modules: what `type` says in a configuration, what builds it, what defines it. A new module is one file
//! and one line here.

use super::{
    AveragePooling, ConvolutionSettings, Described, DropoutSettings, EmbeddingTable, Find, FlattenSettings,
    GeluSettings, LayerNormSettings, LinearMap, MaxPooling, MeanSettings, Module, PositionEmbeddingSettings, Relu,
    ResidualSettings, SelfAttentionSettings, Signal, Tanh,
};
use crate::{Real, Result, Scalar};
use ndarray::ArrayD;
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

macro_rules! modules {
    ($($name:literal $variant:ident($settings:ty),)*) => {
        /// A module as a configuration has it.
        ///
        /// ```
        /// use woracle::modules::{LinearMap, Settings};
        /// let settings: Settings =
        ///     serde_json::from_str(r#"{"type": "linear", "in_features": 2, "out_features": 3}"#).unwrap();
        /// assert_eq!(settings, Settings::Linear(LinearMap { in_features: 2, out_features: 3, bias: true }));
        /// assert!(Settings::TYPES.contains(&"self_attention"));
        /// let empty = Settings::Linear(LinearMap { in_features: 0, out_features: 3, bias: true });
        /// assert!(empty.build::<f32>(&mut rand::SeedableRng::seed_from_u64(0)).is_err()); // C4
        /// ```
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "type")]
        pub enum Settings {
            $(
                #[doc = concat!("`type = \"", $name, "\"`")]
                #[serde(rename = $name)]
                $variant($settings),
            )*
        }

        impl Settings {
            /// What `type` can say.
            pub const TYPES: &[&str] = &[$($name),*];

            /// The module with fresh parameters.
            ///
            /// # Errors
            ///
            /// A setting out of range (C4).
            pub fn build<T: Scalar>(&self, rng: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
                match self {
                    $(Self::$variant(settings) => settings.build(rng),)*
                }
            }

            /// How many numbers the module's parameters are, before any is allocated.
            ///
            /// # Errors
            ///
            /// A setting of a shape that is out of range (C4).
            pub fn elements(&self) -> Result<usize> {
                match self {
                    $(Self::$variant(settings) => settings.elements(),)*
                }
            }

            /// The definition: y of an input that fits, in plain loops on any number; shapes are those of the module.
            ///
            /// # Panics
            ///
            /// Where the module's forward has an error.
            pub fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
                match self {
                    $(Self::$variant(settings) => settings.define(x, parameters),)*
                }
            }
        }
    };
}

modules! {
    "linear" Linear(LinearMap),
    "embedding" Embedding(EmbeddingTable),
    "conv1d" Conv1d(ConvolutionSettings<1>),
    "conv2d" Conv2d(ConvolutionSettings<2>),
    "conv3d" Conv3d(ConvolutionSettings<3>),
    "relu" Relu(Relu),
    "gelu" Gelu(GeluSettings),
    "tanh" Tanh(Tanh),
    "max_pool1d" MaxPool1d(MaxPooling<1>),
    "max_pool2d" MaxPool2d(MaxPooling<2>),
    "avg_pool1d" AvgPool1d(AveragePooling<1>),
    "avg_pool2d" AvgPool2d(AveragePooling<2>),
    "mean" Mean(MeanSettings),
    "flatten" Flatten(FlattenSettings),
    "layer_norm" LayerNorm(LayerNormSettings),
    "self_attention" SelfAttention(SelfAttentionSettings),
    "dropout" Dropout(DropoutSettings),
    "residual" Residual(ResidualSettings),
    "position_embedding" PositionEmbedding(PositionEmbeddingSettings),
}
