//! Implementations that store every intermediate in one type, in two ways, against the bounds that `wora verify`
//! judges by: right ones are accepted, and the bounds are no wider than they must be.

use ndarray::{Array1, Array2, Array3, ArrayD, Axis, Zip};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use rayon::prelude::*;
use std::collections::BTreeMap;
use woracle::Rounded;
use woracle::case::{Case, Tensor, Tensors};
use woracle::cases::{Spec, Twist};
use woracle::operators::{Conv1d, Conv2d, Conv3d, Embedding, Input, Linear, Operator};
use woracle::oracle::verify::{Tolerance, Verdict, verify};
use woracle::oracle::{CaseFile, Dtype};
use woracle::registry::{LAYERS, Precision};
use woracle::wora::{Config, NormAxis, NormGradient};

const SEEDS: u64 = 32;

/// A seed, and which of the inputs that it gives, by the end of its name, is multiplied by what.
type Drawn = (u64, (&'static str, f64));

const AS_DRAWN: (&str, f64) = ("x", 1.0);

/// Which intermediates there are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// W' is formed and the operator applied to it, as merging does.
    Merged,
    /// W' is never formed.
    Factored,
    /// `op(x, W' - W0)` is added to the base output.
    Corrected,
    /// W' is never formed, and `(g beta - 1)` times the base output is added to it, as PEFT's layers do.
    Rescaled,
}

impl Way {
    const ALL: [Self; 4] = [Self::Merged, Self::Factored, Self::Corrected, Self::Rescaled];

    fn forms_weight(self) -> bool {
        matches!(self, Self::Merged | Self::Corrected)
    }
}

struct Stored<'a, O: Operator> {
    case: &'a Case,
    dtype: Dtype,
    operator: O,
    config: Config,
    x: O::Input<'static, f64>,
    mask: Option<ArrayD<f64>>,
}

impl<O: Operator> Stored<'_, O> {
    fn round<D: ndarray::Dimension>(&self, values: ndarray::Array<f64, D>) -> ndarray::Array<f64, D> {
        values.mapv(|value| self.dtype.round(value))
    }
    fn number(&self, value: f64) -> f64 {
        self.dtype.round(value)
    }
    fn values(&self, name: &str) -> ArrayD<f64> {
        self.case.values(name).expect("a tensor").to_owned()
    }
    fn scalar(&self, name: &str) -> f64 {
        self.case.optional(name).expect("a tensor").map_or(1.0, |value| value.sum())
    }
    /// One number a norm, at every element of `[units, fan_in]`.
    fn spread(&self, values: &Array1<f64>, shape: (usize, usize)) -> Array2<f64> {
        let axis = Axis(if self.config.norm_axis == NormAxis::Output { 1 } else { 0 });
        values.view().insert_axis(axis).broadcast(shape).expect("one a norm").to_owned()
    }
    fn sum(&self, values: &Array2<f64>) -> Array1<f64> {
        values.sum_axis(Axis(if self.config.norm_axis == NormAxis::Output { 1 } else { 0 }))
    }
    fn input(&self, values: ArrayD<f64>) -> O::Input<'static, f64> {
        O::Input::from_values(values).expect("values")
    }
    fn apply(&self, x: &O::Input<'_, f64>, weight: &Array2<f64>) -> Array3<f64> {
        self.round(self.operator.apply(x, &[weight.view()]).swap_remove(0))
    }
    fn adjoint_input(&self, dy: &Array3<f64>, weight: &Array2<f64>) -> ArrayD<f64> {
        self.round(self.operator.adjoint_input(&self.x, &[(dy.view(), weight.view())]).expect("values"))
    }
    fn adjoint_weight(&self, operator: &O, x: &O::Input<'_, f64>, dy: &Array3<f64>) -> Array2<f64> {
        self.round(operator.adjoint_weight(x, dy.view()))
    }

    /// y and every gradient, everything rounded when it is stored.
    fn run(&self, way: Way) -> Tensors {
        let units = self.operator.units();
        let [name_a, name_b] = O::LORA_NAMES;
        let weight = self.operator.weight_matrix(self.values("base.weight").view()).to_owned();
        let shape = weight.dim();
        let (stored_a, stored_b) = (self.values(name_a), self.values(name_b));
        let rank = stored_a.shape()[0];
        let a = stored_a.to_shape((rank, shape.1)).expect("A").into_owned();
        let per_group = rank / self.operator.groups();
        let b = stored_b.to_shape((units, per_group)).expect("B").into_owned();
        let first = |u: usize| u / (units / self.operator.groups()) * per_group;
        // B with a zero wherever a unit does not see a rank.
        let mut block = Array2::zeros((units, rank));
        b.indexed_iter().for_each(|((u, k), &value)| block[[u, first(u) + k]] = value);
        let own_ranks = |full: Array2<f64>| Array2::from_shape_fn((units, per_group), |(u, k)| full[[u, first(u) + k]]);

        let (alpha, beta, s) = (self.scalar("lora_wora_alpha"), self.scalar("lora_wora_beta"), self.config.scaling);
        let gamma = self.number(alpha * s);
        let delta = self.round(block.dot(&a));
        let weighted = self.round(self.round(&weight * beta) + self.round(&delta * gamma));
        let has_norm = self.config.has_norm();
        let (mut n, mut norm, mut g) = (Array1::ones(0), Array1::ones(0), Array2::ones(shape));
        let mut results = Tensors::from([("weighted".to_string(), self.operator.stored_weight(weighted.clone()))]);
        let mut per_norm = Array1::ones(0);
        if has_norm {
            norm = self.round(self.sum(&(&weighted * &weighted)).mapv(f64::sqrt));
            n = self.round(norm.mapv(|norm| if norm == 0.0 { 0.0 } else { norm + self.config.norm_eps }));
            let m = Array1::from_iter(self.values("lora_magnitude_vector"));
            let gain = Zip::from(&m).and(&n).map_collect(|&m, &n| if n == 0.0 { 0.0 } else { m / n });
            per_norm = self.round(gain);
            g = self.spread(&per_norm, shape);
            results.extend([
                ("weight_norm".to_string(), n.clone().into_dyn()),
                ("gain".into(), per_norm.clone().into_dyn()),
            ]);
        }
        let merged = self.round(&g * &weighted);
        results.insert("merged_weight".into(), self.operator.stored_weight(merged.clone()));

        let masked = self.mask.as_ref().map(|mask| self.input(self.round(&self.x.values().expect("values") * mask)));
        let met = masked.as_ref().unwrap_or(&self.x);
        let output = self.operator.output_shape(&self.x).expect("a shape");
        let (on_units, on_columns) = match (has_norm, self.config.norm_axis) {
            (true, NormAxis::Output) => (per_norm.clone(), Array1::ones(shape.1)),
            (true, NormAxis::Input) => (Array1::ones(units), per_norm.clone()),
            (false, _) => (Array1::ones(units), Array1::ones(shape.1)),
        };
        let channel = |values: &Array1<f64>| values.clone().insert_axis(Axis(0)).insert_axis(Axis(2));
        let mix = |b: &Array2<f64>, u: &Array3<f64>| -> Array3<f64> {
            let (outer, _, inner) = u.dim();
            let mut z = Array3::zeros((outer, b.nrows(), inner));
            Zip::from(z.outer_iter_mut()).and(u.outer_iter()).for_each(|mut z, u| z.assign(&b.dot(&u)));
            self.round(z)
        };
        let pair = |dy: &Array3<f64>, u: &Array3<f64>| -> Array2<f64> {
            let zero = Array2::zeros((dy.len_of(Axis(1)), u.len_of(Axis(1))));
            self.round(dy.outer_iter().zip(u.outer_iter()).fold(zero, |sum, (dy, u)| sum + dy.dot(&u.t())))
        };
        // What the factored way keeps.
        let gained_w = self.round(&weight * &on_columns);
        let gained_a = self.round(&a * &on_columns);
        let (p, u) = (self.apply(met, &gained_w), self.apply(met, &gained_a));
        let z = mix(&block, &u);

        // What of the base output is missing in it: its gain less 1.
        let less_base = |gains: &Array1<f64>| self.round(gains * beta - 1.0);
        let (missing_units, missing_columns) = match (has_norm, self.config.norm_axis) {
            (true, NormAxis::Input) => (on_units.clone(), less_base(&on_columns)),
            _ => (less_base(&on_units), on_columns.clone()),
        };
        let missing_w = self.round(&weight * &missing_columns);

        let mut y = match way {
            Way::Merged if masked.is_none() => self.apply(met, &merged),
            Way::Merged | Way::Corrected => {
                self.apply(&self.x, &weight) + self.apply(met, &self.round(&merged - &weight))
            }
            Way::Rescaled => {
                let missing = self.round(self.apply(met, &missing_w) * channel(&missing_units));
                let lora = self.round(&z * &channel(&self.round(&on_units * gamma)));
                self.apply(&self.x, &weight) + self.round(missing + lora)
            }
            Way::Factored => {
                let base = self.round(&p * &channel(&self.round(&on_units * beta)));
                let lora = self.round(&z * &channel(&self.round(&on_units * gamma)));
                let y = self.round(base + lora);
                match &masked {
                    Some(masked) => {
                        let kept = self.round(&self.x.values().expect("values") - &masked.values().expect("values"));
                        y + self.apply(&self.input(kept), &weight)
                    }
                    None => y,
                }
            }
        };
        y = self.round(y);
        if let Some(bias) = self.case.optional("base.bias").expect("a bias or none") {
            y = self.round(y + channel(&Array1::from_iter(bias.iter().copied())));
        }
        results.insert("y".into(), y.into_shape_with_order(output).expect("y"));

        // Backward.
        let dy = self.values("grad.y").to_shape(p.dim()).expect("dy").into_owned();
        let whole = self.operator.power(1);
        let dmerged = self.adjoint_weight(&whole, met, &dy);
        let fraction = self.operator.gradient_fraction(&self.x).map(Array1::from);
        let part = |dv: &Array2<f64>| fraction.as_ref().map_or(dv.clone(), |fraction| self.round(dv * fraction));
        let direct = self.round(&g * &dmerged);
        let h = self.round(&dy * &channel(&on_units));
        let mut k = Array2::zeros(shape);
        if has_norm {
            let c = match way {
                Way::Factored | Way::Rescaled if self.config.norm_axis == NormAxis::Output => {
                    let products = self.round(&dy * &self.round(self.round(&p * beta) + self.round(&z * gamma)));
                    self.round(products.sum_axis(Axis(2)).sum_axis(Axis(0)))
                }
                _ => self.round(self.sum(&(&dmerged * &weighted))),
            };
            let over = |values: &Array1<f64>| {
                self.round(Zip::from(values).and(&n).map_collect(|&c, &n| if n == 0.0 { 0.0 } else { c / n }))
            };
            let dm = over(&c);
            let m = self.values("lora_magnitude_vector");
            let dm_stored = dm.clone().into_shape_with_order(m.shape()).expect("dm");
            results.insert("grad.lora_magnitude_vector".into(), dm_stored);
            if self.config.norm_gradient == NormGradient::Full {
                let of_norm = Zip::from(&per_norm).and(&norm).map_collect(|&g, &n| if n == 0.0 { 0.0 } else { g / n });
                k = self.spread(&self.round(-dm * self.round(of_norm)), shape);
            }
        }
        let through = self.round(&k * &weighted);
        let [dalpha, dbeta]: [f64; 2];
        let (mut da, mut db, mut dw);
        if way.forms_weight() {
            let dv = self.round(&direct + &through);
            let looked_up = self.round(part(&direct) + &through);
            dalpha = self.number((&dv * &delta).sum());
            dbeta = self.number((&dv * &weight).sum());
            db = self.round(own_ranks(dv.dot(&a.t())));
            da = self.round(block.t().dot(&looked_up));
            (da, db) = (self.round(da * gamma), self.round(db * gamma));
            dw = self.round(&looked_up * beta);
        } else {
            let paths = [(&delta, &z), (&weight, &p)].map(|(of_weight, output)| {
                let through_norm = self.number((&through * of_weight).sum());
                self.number(self.number(self.round(&h * output).sum()) + through_norm)
            });
            [dalpha, dbeta] = paths;
            let h_gamma = self.round(&h * gamma);
            let t = mix(&block.t().to_owned(), &h_gamma);
            let u_met = match self.config.norm_axis {
                NormAxis::Input if has_norm => self.input(self.round(&met.values().expect("values") * &on_columns)),
                _ => met.clone(),
            };
            da = self.adjoint_weight(&self.operator, &u_met, &t);
            db = own_ranks(pair(&h_gamma, &u));
            let norm_a = self.round(self.round(block.t().dot(&through)) * gamma);
            let norm_b = self.round(self.round(own_ranks(through.dot(&a.t()))) * gamma);
            (da, db) = (self.round(da + norm_a), self.round(db + norm_b));
            let direct = if way == Way::Rescaled {
                let missing = self.round(&dy * &channel(&missing_units));
                self.round(self.adjoint_weight(&self.operator, met, &missing) * &missing_columns)
            } else {
                self.adjoint_weight(&self.operator, &u_met, &self.round(&h * beta))
            };
            dw = self.round(direct + self.round(&through * beta));
        }
        // The base output's own.
        let of_base = || self.adjoint_weight(&self.operator, &self.x, &dy);
        if way == Way::Rescaled {
            dw = self.round(of_base() + dw);
        } else if way == Way::Corrected {
            dw = self.round(self.round(of_base() + dw) - part(&dmerged));
        } else if masked.is_some() {
            let kept = self.round(self.adjoint_weight(&whole, &self.x, &dy) - &dmerged);
            dw = self.round(dw + kept);
        }
        if self.config.method == woracle::wora::Method::Wora {
            let scalar = |value: f64| ArrayD::from_elem(vec![], value);
            let dalpha = scalar(self.number(dalpha * s));
            results.extend([("grad.lora_wora_alpha".into(), dalpha), ("grad.lora_wora_beta".into(), scalar(dbeta))]);
        }
        let as_stored = |values: Array2<f64>, like: &ArrayD<f64>| {
            values.as_standard_layout().into_owned().into_shape_with_order(like.shape()).expect("as many")
        };
        results.insert(format!("grad.{name_a}"), as_stored(da, &stored_a));
        results.insert(format!("grad.{name_b}"), as_stored(db, &stored_b));
        results.insert("grad.base.weight".into(), self.operator.stored_weight(dw));
        if self.case.tensors.contains_key("base.bias") {
            let db = self.round(dy.sum_axis(Axis(2)).sum_axis(Axis(0)));
            results.insert("grad.base.bias".into(), db.into_dyn());
        }
        if self.x.values().is_some() {
            let masked_gradient = |gradient: ArrayD<f64>, mask: &Option<ArrayD<f64>>| match mask {
                Some(mask) => self.round(gradient * mask),
                None => gradient,
            };
            let dx = match (way, &self.mask) {
                (Way::Merged, None) => self.adjoint_input(&dy, &merged),
                (Way::Merged | Way::Corrected, mask) => {
                    let correction = self.adjoint_input(&dy, &self.round(&merged - &weight));
                    self.adjoint_input(&dy, &weight) + masked_gradient(correction, mask)
                }
                (Way::Rescaled, mask) => {
                    let missing = self.adjoint_input(&self.round(&dy * &channel(&missing_units)), &missing_w);
                    let t = mix(&block.t().to_owned(), &self.round(&h * gamma));
                    let correction = self.round(missing + self.adjoint_input(&t, &gained_a));
                    self.adjoint_input(&dy, &weight) + masked_gradient(correction, mask)
                }
                (Way::Factored, mask) => {
                    let h_beta = self.round(&h * beta);
                    let t = mix(&block.t().to_owned(), &self.round(&h * gamma));
                    let through = self.adjoint_input(&h_beta, &gained_w) + self.adjoint_input(&t, &gained_a);
                    match mask {
                        None => through,
                        Some(mask) => {
                            let base = self.adjoint_input(&dy, &weight);
                            let kept = self.round(&base * &self.round(mask.mapv(|k| 1.0 - k)));
                            self.round(self.round(through) * mask) + kept
                        }
                    }
                }
            };
            results.insert("grad.x".into(), self.round(dx));
        }
        results
    }
}

/// A case whose inputs are numbers of the type, answered by an implementation that stores everything in it; one of the
/// drawn inputs is multiplied by a number.
fn answered(spec: &Spec, layer: usize, (seed, (input, factor)): Drawn, dtype: Dtype, way: Way) -> CaseFile {
    let mut case = LAYERS[layer].draw(spec, seed);
    let ends_so = |(name, _): &(&String, &mut Tensor)| name.ends_with(input);
    if let Some((_, Tensor::Float(values))) = case.tensors.iter_mut().find(ends_so) {
        *values = values.mapv(|value| value * factor).into();
    }
    with_answers(case, dtype, way)
}

/// The same of a case at hand.
fn with_answers(case: Case, dtype: Dtype, way: Way) -> CaseFile {
    fn run<O: Operator>(case: &Case, dtype: Dtype, way: Way) -> Tensors {
        let weight = case.values("base.weight").expect("W0").shape();
        let operator = O::from_weight_shape(case.settings().expect("settings"), weight).expect("an operator");
        let x = match &case.tensors["x"] {
            Tensor::Int(ids) => O::Input::from_ids(ids.clone()).expect("ids"),
            Tensor::Float(values) => O::Input::from_values(values.to_owned()).expect("values"),
        };
        let mask = case.optional("dropout_mask").expect("a mask or none").map(|mask| mask.to_owned());
        let config = case.settings().expect("a config");
        Stored::<O> { case, dtype, operator, config, x, mask }.run(way)
    }
    let mut case = CaseFile::rounded(case, dtype).case;
    let results = match case.layer.as_str() {
        "linear" => run::<Linear>(&case, dtype, way),
        "embedding" => run::<Embedding>(&case, dtype, way),
        "conv1d" => run::<Conv1d>(&case, dtype, way),
        "conv2d" => run::<Conv2d>(&case, dtype, way),
        _ => run::<Conv3d>(&case, dtype, way),
    };
    case.extend(results);
    CaseFile::new(case, dtype)
}

/// The small cases. Weights of 2^-80 are nothing in f16.
fn specs(dtype: Dtype) -> Vec<(usize, &'static Spec)> {
    let all =
        LAYERS.iter().enumerate().flat_map(|(layer, subject)| subject.specs().iter().map(move |spec| (layer, spec)));
    let small = all.filter(|(_, spec)| !spec.name.contains("large"));
    small.filter(|(_, spec)| dtype != Dtype::F16 || spec.twist != Twist::Tiny).collect()
}

/// Of every tensor of every case, the largest error over its bound of all seeds and gains, and of all ways of computing.
fn worst(
    specs: Vec<(usize, &'static Spec)>,
    seeds: &[Drawn],
    dtype: Dtype,
    ways: &[Way],
) -> BTreeMap<(&'static str, String), f64> {
    let of_case = |(layer, spec): (usize, &'static Spec)| {
        let mut worst = BTreeMap::new();
        for (&seed, &way) in seeds.iter().flat_map(|seed| ways.iter().map(move |way| (seed, way))) {
            for tensor in verify(&answered(spec, layer, seed, dtype, way), Tolerance::default()).expect("a verdict") {
                let of = worst.entry((spec.name, tensor.name)).or_insert(0.0_f64);
                *of = of.max(tensor.error_over_bound);
            }
        }
        worst
    };
    specs.into_par_iter().flat_map_iter(of_case).collect()
}

/// What is wrong with these, which are printed as a table; no bound may be so many times as wide as `widest`.
fn wrong(dtype: Dtype, of: &str, worst: BTreeMap<(&'static str, String), f64>, widest: f64) -> Vec<String> {
    let mut wrong = vec![];
    let mut table: BTreeMap<String, [f64; 2]> = BTreeMap::new();
    for ((case, tensor), worst) in worst {
        if worst > 1.0 {
            wrong.push(format!("{dtype} {of} {case} {tensor}: an error of {worst:.2} bounds"));
        }
        let wide = 1.0 / worst;
        // In f64 the oracle's own error counts as much, and sums that are exact show none.
        if dtype != Dtype::F64 && worst > 0.0 && wide > widest {
            wrong.push(format!("{dtype} {of} {case} {tensor}: a bound of {wide:.1} worst errors"));
        }
        let [most, widest_of_all] = table.entry(tensor).or_insert([0.0, 0.0]);
        *most = most.max(worst);
        *widest_of_all = if worst > 0.0 { widest_of_all.max(wide) } else { *widest_of_all };
    }
    println!("{dtype}, {of}: largest error over its bound, widest bound over the case's largest error");
    for (tensor, [most, wide]) in table {
        let wide = if widest.is_finite() { format!(" {wide:6.1}") } else { String::new() };
        println!("  {tensor:28} {most:6.3}{wide}");
    }
    wrong
}

/// E55 to E73, E151: too narrow a bound refuses one of them, too wide a one is more than 32 times what they reach.
#[test]
fn implementations_that_store_every_intermediate_in_a_type_are_accepted_by_bounds_not_much_wider_than_their_errors() {
    let seeds: Vec<_> = (0..SEEDS).map(|seed| (seed, AS_DRAWN)).collect();
    let of_way = |(dtype, way): (Dtype, Way)| {
        wrong(dtype, &format!("{way:?}"), worst(specs(dtype), &seeds, dtype, &[way]), 32.0)
    };
    let all = Dtype::ALL.into_iter().flat_map(|dtype| [Way::Merged, Way::Factored].map(|way| (dtype, way)));
    let wrong: Vec<_> = all.flat_map(of_way).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Inputs far from their usual size: multiplied by what, for so many seeds, and whether bounds are to be narrow there. Where
/// f16 and bf16 keep nothing of a gain beside 1, who adds to the base output gets an exact 0, and is less far off than
/// most.
const SIZES: &[((&str, f64), u64, bool)] = &[
    (AS_DRAWN, 2, false),
    (("lora_magnitude_vector", 0.4), 1, false),
    (("lora_magnitude_vector", 0.1), 4, true),
    (("lora_magnitude_vector", 0.01), 2, false),
    (("lora_magnitude_vector", 1e-3), 1, false),
    (("lora_magnitude_vector", 3.0), 1, false),
    (("lora_magnitude_vector", 30.0), 1, false),
    (("lora_magnitude_vector", -0.7), 2, false),
];

/// Inputs that leave numbers below the smallest normal one of f16.
const SMALL: &[((&str, f64), u64)] = &[(("_B", 1e-4), 2), (("_A", 1e-3), 2), (("x", 1e-3), 2), (("grad.y", 1e-5), 2)];

/// E152: the base output is rounded before a small gain has made it small, or never. What is stored below the smallest normal
/// number has few digits.
#[test]
fn they_are_accepted_whatever_the_sizes_are() {
    let mut all = vec![];
    let mut judge = |dtype: Dtype, scale: (&'static str, f64), seeds: u64, widest: f64| {
        let drawn: Vec<_> = (0..seeds).map(|seed| (seed, scale)).collect();
        let mut specs = specs(dtype);
        // Without W0, V of such a small pair has a gain that f16 has not.
        let is_of_pair = scale.0 == "_A" || scale.0 == "_B";
        let has_gain = |spec: &Spec| spec.config.has_norm() && !(is_of_pair && spec.alpha_beta.1 == 0.0);
        specs.retain(|(_, spec)| spec.twist != Twist::Exact && has_gain(spec));
        let of = format!("{} times {}", scale.0, scale.1);
        all.extend(wrong(dtype, &of, worst(specs, &drawn, dtype, &Way::ALL), widest));
    };
    for &(scale, seeds, is_narrow) in SIZES {
        for dtype in Dtype::ALL {
            judge(dtype, scale, seeds, if is_narrow { 32.0 } else { f64::INFINITY });
        }
    }
    for &(scale, seeds) in SMALL {
        judge(Dtype::F16, scale, seeds, f64::INFINITY);
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn zeros_are_accepted_only_where_the_truth_is_a_small_difference_of_large_terms() {
    let mut wrong = vec![];
    for dtype in Dtype::ALL {
        for (layer, spec) in specs(dtype) {
            let subject = LAYERS[layer];
            let mut file = answered(spec, layer, (0, AS_DRAWN), dtype, Way::Merged);
            let (right, sizes) = (subject.define(&file.case).expect("y"), subject.roundings(&file.case).expect("y"));
            for name in right.keys() {
                if let Some(Tensor::Float(values)) = file.case.tensors.get_mut(name) {
                    values.fill(0.0);
                }
            }
            for tensor in verify(&file, Tolerance::default()).expect("a verdict") {
                let terms = right[&tensor.name].iter().zip(&sizes[&tensor.name]);
                let not_small =
                    |(value, size): (&f64, &Rounded)| value.abs() > 64.0 * dtype.unit_roundoff() * size.size();
                if tensor.verdict == Verdict::Pass && terms.into_iter().any(not_small) {
                    wrong.push(format!("{dtype} {} {}", spec.name, tensor.name));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_type_rounds_as_the_processor_and_half_do() {
    let mut values: Vec<f64> =
        vec![0.0, -0.0, 1.0, f64::INFINITY, f64::NEG_INFINITY, 1e300, -1e300, 5e-324, 65504.0, 65520.0];
    let mut state = 1_u64;
    for _ in 0..200_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let exponent = (state >> 40) % 330;
        values.push(f64::from_bits((state & !(0x7ff << 52)) | ((exponent + 850) << 52)));
        // Ties of every type, and their neighbours.
        let tie = f64::from((state >> 32) as u32 & 0xfff | 1) * 2f64.powi((state % 60) as i32 - 40);
        values.extend([tie, tie.next_up(), tie.next_down(), -tie]);
    }
    for value in values {
        assert_eq!(Dtype::F32.round(value).to_bits(), f64::from(value as f32).to_bits(), "{value:e}");
        assert_eq!(Dtype::F64.round(value).to_bits(), value.to_bits());
        // Through f32 with a sticky last bit, which rounds once.
        let nearest = value as f32;
        let inexact = f64::from(nearest) != value && nearest.is_finite();
        let truncated = if inexact && f64::from(nearest).abs() > value.abs() {
            f32::from_bits(nearest.to_bits() - 1)
        } else {
            nearest
        };
        let sticky = if inexact { f32::from_bits(truncated.to_bits() | 1) } else { truncated };
        assert_eq!(Dtype::Bf16.round(value), half::bf16::from_f32(sticky).to_f64(), "bf16 {value:e}");
        assert_eq!(Dtype::F16.round(value), half::f16::from_f32(sticky).to_f64(), "f16 {value:e}");
    }
}

#[test]
fn an_exact_case_is_the_same_bits_in_every_type_and_both_ways() {
    let mut compared = 0;
    for (layer, spec) in specs(Dtype::F64).into_iter().filter(|(_, spec)| spec.twist == Twist::Exact) {
        for seed in 0..SEEDS {
            for dtype in Dtype::ALL {
                for way in Way::ALL {
                    let file = answered(spec, layer, (seed, AS_DRAWN), dtype, way);
                    let drawn = LAYERS[layer].draw(spec, seed);
                    assert!(
                        drawn.tensors.iter().all(|(name, tensor)| file.case.tensors[name] == *tensor),
                        "{}",
                        spec.name
                    );
                    for tensor in verify(&file, Tolerance::default()).expect("a verdict") {
                        let place = format!("{dtype} {way:?} {} seed {seed} {}", spec.name, tensor.name);
                        assert_eq!((tensor.max_abs_error, tensor.bound), (0.0, 0.0), "{place}");
                        compared += 1;
                    }
                }
            }
        }
    }
    assert!(compared > 8 * 100, "{compared}");
}

#[test]
fn an_exact_case_forgives_nothing() {
    let (layer, spec) = specs(Dtype::F64).into_iter().find(|(_, spec)| spec.twist == Twist::Exact).expect("one");
    let mut file = answered(spec, layer, (0, AS_DRAWN), Dtype::F64, Way::Merged);
    let Some(Tensor::Float(y)) = file.case.tensors.get_mut("y") else { panic!("y") };
    y[[0, 0]] = y[[0, 0]].next_up();
    let failed: Vec<String> = verify(&file, Tolerance::default())
        .expect("a verdict")
        .into_iter()
        .filter(|tensor| tensor.verdict == Verdict::Fail)
        .map(|tensor| tensor.name)
        .collect();
    assert_eq!(failed, ["y"]);
}

/// How far off y may be of a LoRA layer, whose units have no norms in common.
fn rounding_of_y(change: impl FnOnce(&mut Case)) -> ArrayD<f64> {
    let linear = LAYERS[0];
    let spec = linear.specs().iter().find(|spec| spec.name == "linear-lora").expect("a case");
    let mut case = linear.draw(spec, 5);
    change(&mut case);
    case.extend(Tensors::from([("y".to_string(), linear.define(&case).expect("y").remove("y").expect("y"))]));
    let (_, mut roundings) = linear.expect(&case, &[Dtype::F64.storage()]).expect("roundings");
    roundings[0].remove("y").expect("y")
}

/// Multiplies the first columns of a tensor.
fn scale(case: &mut Case, name: &str, columns: usize, factor: f64) {
    let Some(Tensor::Float(values)) = case.tensors.get_mut(name) else { panic!("{name}") };
    let last = Axis(values.ndim() - 1);
    values.slice_axis_mut(last, (..columns).into()).mapv_inplace(|value| value * factor);
}

#[test]
fn bounds_are_right_where_f32_has_not_the_range() {
    let usual = rounding_of_y(|_| {});
    let factor = 2.0_f64.powi(-100);
    // What is multiplied into the weight and out of the input leaves the products as they were.
    let apart = rounding_of_y(|case| {
        scale(case, "x", 2, factor);
        for name in ["base.weight", "lora_A"] {
            scale(case, name, 2, 1.0 / factor);
        }
    });
    let small = rounding_of_y(|case| {
        let all = case.tensors["x"].shape()[1];
        scale(case, "x", all, factor);
        case.tensors.remove("base.bias");
    });
    let without_bias = rounding_of_y(|case| {
        case.tensors.remove("base.bias");
    });
    for ((&usual, &apart), (&without_bias, &small)) in usual.iter().zip(&apart).zip(without_bias.iter().zip(&small)) {
        assert!((apart / usual - 1.0).abs() < 1e-5, "expected {usual:e}, found {apart:e}");
        assert!((small / factor / without_bias - 1.0).abs() < 1e-5, "expected {without_bias:e}, found {small:e}");
    }
}

/// A linear layer without bias of so many tokens, inputs, outputs and ranks, of numbers from `least` to 1.
fn linear(
    seed: u64,
    [tokens, inputs, outputs, rank]: [usize; 4],
    least: f64,
    magnitude: impl Fn(usize) -> f64,
) -> Case {
    let linear = LAYERS[0];
    let spec = linear.specs().iter().find(|spec| spec.name == "linear-plain").expect("a case");
    let mut rng = Pcg64::seed_from_u64(seed);
    let mut draw = |shape: &[usize]| ArrayD::from_shape_simple_fn(shape, || rng.random_range(least..1.0));
    let mut case = linear.draw(spec, seed);
    case.tensors.remove("base.bias");
    case.extend(Tensors::from([
        ("x".to_string(), draw(&[tokens, inputs])),
        ("base.weight".into(), draw(&[outputs, inputs])),
        ("lora_A".into(), draw(&[rank, inputs])),
        ("lora_B".into(), draw(&[outputs, rank])),
        ("lora_magnitude_vector".into(), Array1::from_shape_fn(outputs, magnitude).into_dyn()),
        ("grad.y".into(), draw(&[tokens, outputs])),
    ]));
    case
}

/// E152, E153: a gradient of the base output that is far larger than its terms are apart, of gains alike and of both signs.
#[test]
fn small_gains_of_sums_that_do_not_cancel_are_accepted() {
    let alike = |unit: usize| 0.2 + 0.01 * (unit % 5) as f64;
    let of_both_signs = |unit: usize| if unit.is_multiple_of(2) { 0.2 } else { -0.2 };
    for (which, magnitude) in [("alike", &alike as &dyn Fn(usize) -> f64), ("of both signs", &of_both_signs)] {
        for (dtype, way) in Dtype::ALL.into_iter().flat_map(|dtype| Way::ALL.map(|way| (dtype, way))) {
            let case = linear(1, [4, 8, 2048, 2], 0.5, magnitude);
            for tensor in verify(&with_answers(case, dtype, way), Tolerance::default()).expect("verdicts") {
                let place = format!("{which}, {dtype} {way:?} {}", tensor.name);
                assert_eq!(tensor.verdict, Verdict::Pass, "{place}: {:.2}", tensor.error_over_bound);
            }
        }
    }
}

/// Where ranks are more than features, B A may be far smaller than what it adds up: its norm is taken of the row then.
#[test]
fn pairs_that_cancel_over_their_ranks_are_accepted() {
    for (seed, way) in (0..6).flat_map(|seed| Way::ALL.map(|way| (seed, way))) {
        let mut case = linear(seed, [8, 1, 300, 64], -1.0, |_| 2.0);
        case.extend(Tensors::from([("lora_wora_beta".to_string(), ArrayD::from_elem(vec![], 0.02))]));
        for tensor in verify(&with_answers(case, Dtype::F64, way), Tolerance::default()).expect("verdicts") {
            let place = format!("seed {seed} {way:?} {}", tensor.name);
            assert_eq!(tensor.verdict, Verdict::Pass, "{place}: {:.2}", tensor.error_over_bound);
        }
    }
}

#[test]
fn sums_in_any_order_are_accepted_in_f64() {
    for (seed, rank) in (0..8).zip([8, 64, 256].into_iter().cycle()) {
        let mut case = linear(seed, [64, 192, 256, rank], -1.0, |_| 2.0);
        // The definition adds up one by one, the production path in blocks and by lanes: both are judged.
        case.extend(LAYERS[0].evaluate(&case, Precision::F64).expect("answers"));
        for tensor in verify(&CaseFile::new(case, Dtype::F64), Tolerance::default()).expect("verdicts") {
            let place = format!("seed {seed}, rank {rank}, {}", tensor.name);
            assert_eq!(tensor.verdict, Verdict::Pass, "{place}: {:e}", tensor.error_over_bound);
        }
    }
}
