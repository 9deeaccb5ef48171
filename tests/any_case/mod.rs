//! A case of any layer, any shape and any settings, made of choices: a property test's or a fuzzer's.

use std::collections::BTreeSet;
use std::sync::Mutex;
use woracle::case::Case;
use woracle::cases::Spec;
use woracle::registry::{LAYERS, Subject};
use woracle::wora::{Config, Method, ZeroNorm};
use woracle::{NormAxis, NormGradient};

/// Choices one after the other, 0 where there are no more: whatever is taken away leaves a simpler case.
pub struct Choices<'a> {
    bytes: &'a [u8],
    /// What sizes are multiplied by.
    scale: usize,
}

impl<'a> Choices<'a> {
    /// The choices of these bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, scale: 1 }
    }

    /// Of cases that are so much larger along the axes that work is shared out by.
    pub fn larger(self, scale: usize) -> Self {
        Self { scale, ..self }
    }

    /// A number below this one.
    pub fn below(&mut self, count: usize) -> usize {
        let Some((first, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        usize::from(*first) % count
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    fn sizes(&mut self, count: usize, least: usize, most: usize) -> Vec<usize> {
        (0..count).map(|_| least + self.below(most - least + 1)).collect()
    }

    fn seed(&mut self) -> u64 {
        (0..4).fold(0, |seed, _| seed << 8 | self.below(256) as u64)
    }
}

/// A spec has what a program is written with. Each is kept once, however many cases are made.
static SHAPES: Mutex<BTreeSet<&'static [usize]>> = Mutex::new(BTreeSet::new());
static TEXTS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

fn kept<T: ?Sized + Ord>(all: &Mutex<BTreeSet<&'static T>>, one: Box<T>) -> &'static T {
    let mut all = all.lock().expect("nobody panicked here");
    if let Some(known) = all.get(&*one) {
        return known;
    }
    let one: &'static T = Box::leak(one);
    all.insert(one);
    one
}

/// The shapes and the settings of an operator.
struct Shapes {
    x: Vec<usize>,
    weight: Vec<usize>,
    operator: String,
    groups: usize,
    takes_values: bool,
}

fn linear(choices: &mut Choices<'_>) -> Shapes {
    let stored_transposed = choices.below(2) == 1;
    let axes = choices.below(4);
    let mut x = choices.sizes(axes, if axes == 1 { 0 } else { 1 }, 4);
    let mut weight = choices.sizes(2, 1, 9).into_iter().map(|size| size * choices.scale).collect::<Vec<_>>();
    x.push(weight[1]);
    if stored_transposed {
        weight.reverse();
    }
    let operator = format!(r#"{{"fan_in_fan_out":{stored_transposed}}}"#);
    Shapes { x, weight, operator, groups: 1, takes_values: true }
}

fn embedding(choices: &mut Choices<'_>) -> Shapes {
    let axes = choices.below(3);
    let (x, weight) = (choices.sizes(axes, 1, 6), choices.sizes(2, 1, 9));
    let weight: Vec<usize> = weight.into_iter().map(|size| size * choices.scale).collect();
    let scale = choices.of(&[1.0, 2.5, -0.5]);
    let padding = if choices.below(2) == 1 { choices.below(weight[0]).to_string() } else { "null".into() };
    let by_frequency = choices.below(2) == 1;
    let operator =
        format!(r#"{{"embed_scale":{scale:?},"padding_idx":{padding},"scale_grad_by_freq":{by_frequency}}}"#);
    Shapes { x, weight, operator, groups: 1, takes_values: false }
}

fn conv(choices: &mut Choices<'_>, axes: usize) -> Shapes {
    let groups = choices.of(&[1, 1, 2, 3]);
    let [images, channels, units] = [choices.below(2) + 1, choices.below(3) + 1, choices.below(3) + 1];
    let [channels, units] = [channels, units].map(|size| size * choices.scale);
    let kernel = choices.sizes(axes, 1, 3);
    let mode = choices.of(&["zeros", "reflect", "replicate", "circular"]);
    let (stride, dilation) = (choices.sizes(axes, 1, 3), choices.sizes(axes, 1, 2));
    let padding = match choices.below(4) {
        0 => r#""valid""#.into(),
        1 if stride.iter().all(|&stride| stride == 1) => r#""same""#.into(),
        _ => format!("{:?}", choices.sizes(axes, 0, 2)),
    };
    let size = choices.sizes(axes, 1, if axes == 3 { 5 } else { 8 });
    let mut x = vec![channels * groups];
    x.extend(size);
    if choices.below(4) > 0 {
        x.insert(0, images);
    }
    let mut weight = vec![units * groups, channels];
    weight.extend(kernel);
    let operator = format!(
        r#"{{"groups":{groups},"stride":{stride:?},"dilation":{dilation:?},"padding":{padding},"padding_mode":"{mode}"}}"#
    );
    Shapes { x, weight, operator, groups, takes_values: true }
}

/// A case, of every layer as often; `None` where the choices contradict each other, as a kernel that does not fit.
pub fn any_case(choices: &mut Choices<'_>) -> Option<(&'static dyn Subject, Case)> {
    let layer = choices.of(LAYERS);
    let shapes = match layer.name() {
        "linear" => linear(choices),
        "embedding" => embedding(choices),
        "conv1d" => conv(choices, 1),
        "conv2d" => conv(choices, 2),
        "conv3d" => conv(choices, 3),
        other => panic!("no shapes are known for {other}"),
    };
    let config = Config {
        scaling: choices.of(&[1.5, 0.25, -1.0]),
        norm_gradient: choices.of(&[NormGradient::Detached, NormGradient::Full]),
        norm_axis: if layer.name() == "linear" {
            choices.of(&[NormAxis::Output, NormAxis::Input])
        } else {
            NormAxis::Output
        },
        norm_eps: choices.of(&[0.0, 0.0, 0.125]),
        zero_norm: ZeroNorm::Error,
        ..Config::new(choices.of(&[Method::Wora, Method::Wora, Method::Dora, Method::Lora]), 1.0)
    };
    let dropout = choices.of(&[None, Some(0.5), Some(0.25)]).filter(|_| shapes.takes_values);
    let scales = [1.25, 0.75, -0.5, 1.0, 2.0];
    let spec = Spec {
        x: kept(&SHAPES, shapes.x.into()),
        weight: kept(&SHAPES, shapes.weight.into()),
        rank: shapes.groups * (choices.below(4) + 1),
        bias: shapes.takes_values && choices.below(2) == 0,
        dropout,
        config,
        alpha_beta: (choices.of(&scales), choices.of(&scales)),
        operator: kept(&TEXTS, shapes.operator.into()),
        ..Spec::plain("any")
    };
    let case = layer.try_draw(&spec, choices.seed()).ok()?;
    Some((layer, case))
}
