//! Steps in memory that other steps have left, against steps in fresh memory: the same bits.

use ndarray::{ArrayD, IxDyn};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use woracle::operators::{Conv2d, ConvSettings, Embedding, EmbeddingSettings, Input, Linear, LinearSettings, Operator};
use woracle::wora::{Base, Config, Layer, LoraInit, Method, NormAxis, RequiresGrad, Workspace};

fn random(shape: &[usize], rng: &mut Pcg64) -> ArrayD<f64> {
    ArrayD::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
}

/// Two steps in a workspace full of numbers that are none, and one in fresh memory.
fn the_same_in_both<O: Operator>(settings: O::Settings, config: Config, weight: &[usize], x: O::Input<'static, f64>) {
    let mut rng = Pcg64::seed_from_u64(5);
    let operator = O::from_weight_shape(settings, weight).unwrap();
    let base = Base { weight: random(weight, &mut rng).into(), bias: Some(random(&[operator.units()], &mut rng)) };
    let rank = operator.groups();
    let mut layer = Layer::init(operator, config, base, rank, LoraInit::default(), &mut rng).unwrap();
    layer.adapter_mut().into_iter().for_each(|(_, mut values)| values.mapv_inplace(|v| v + rng.random_range(0.1..0.5)));
    let mask = x.values().map(|values| values.mapv(|v| if v < 0.0 { 0.0 } else { 2.0 }));
    for mask in [None, mask] {
        let mask = mask.as_ref().map(|mask| mask.view());
        let (y, cache) = layer.forward(x.clone(), mask.clone()).unwrap();
        let dy = random(y.shape(), &mut rng);
        let gradients = layer.backward(cache, dy.view(), RequiresGrad::ALL).unwrap();
        let workspace = Workspace::default();
        for elements in 1..2000 {
            workspace.recycle(ArrayD::from_elem(IxDyn(&[elements]), f64::NAN));
        }
        for _ in 0..2 {
            let (again, cache) = layer.forward_in(&workspace, x.clone(), mask.clone()).unwrap();
            assert_eq!(again, y);
            let of_again = layer.backward_in(&workspace, cache, dy.view(), RequiresGrad::ALL).unwrap();
            assert_eq!(of_again, gradients);
            workspace.recycle(again);
            of_again.x.into_iter().for_each(|dx| workspace.recycle(dx));
        }
    }
}

fn conv(json: &str) -> ConvSettings {
    serde_json::from_str(json).unwrap()
}

#[test]
fn what_the_memory_held_before_changes_no_bit() {
    let config = Config::new(Method::Wora, 1.5);
    let per_input = Config { norm_axis: NormAxis::Input, ..config };
    let mut rng = Pcg64::seed_from_u64(4);
    let rows = random(&[5, 7], &mut rng);
    the_same_in_both::<Linear>(LinearSettings::default(), config, &[6, 7], rows.clone().into());
    the_same_in_both::<Linear>(LinearSettings::default(), per_input, &[3, 7], rows.into());
    let ids = ArrayD::from_shape_fn(IxDyn(&[9]), |index| (index[0] * 5 % 7) as i64);
    let ids = <_ as Input<f64>>::from_ids(ids).unwrap();
    the_same_in_both::<Embedding>(EmbeddingSettings::default(), config, &[7, 4], ids);
    let images = random(&[2, 4, 6, 5], &mut rng);
    for (json, weight) in [
        (r#"{"padding":1}"#, [6, 4, 3, 3]),
        (r#"{"padding":2,"stride":2}"#, [2, 4, 3, 3]),
        ("{}", [6, 4, 1, 1]),
        (r#"{"padding":1,"groups":2}"#, [6, 2, 3, 3]),
        (r#"{"padding":1,"groups":4}"#, [8, 1, 3, 3]),
    ] {
        the_same_in_both::<Conv2d>(conv(json), config, &weight, images.clone().into());
    }
}
