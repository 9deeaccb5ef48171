//! `wora explain`: what it says of every layer, how it reads, and what it says to those who ask for what there is not.

use assert_cmd::Command;
use std::collections::BTreeSet;
use std::fs;
use woracle::case::Tensor;
use woracle::explain::{Chapter, Explanation, Shape, Walk, drawn, examples};
use woracle::gradcheck::Verdict;
use woracle::registry::{LAYERS, Precision, specs};
use woracle::wora::{Method, NormAxis};

fn wora(arguments: &[&str]) -> std::process::Output {
    Command::cargo_bin("wora").expect("the command").args(arguments).output().expect("a run")
}

fn said(arguments: &[&str]) -> String {
    let output = wora(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn columns(line: &str) -> usize {
    line.chars().filter(|&letter| letter != '\u{303}').count()
}

#[test]
fn every_layer_is_explained_within_eighty_columns() {
    for layer in LAYERS {
        for more in [&["--full"][..], &["--seed", "5"], &[]] {
            let text = said(&[&["explain", layer.name()], more].concat());
            let wide: Vec<_> = text.lines().filter(|line| columns(line) > 80).collect();
            assert!(wide.is_empty(), "{wide:?}");
            assert!(text.contains("E9    V = β W0 + α s Δ") && text.contains("grad.lora_wora_beta"), "{text}");
            assert_eq!(text.contains("through the norm (section 5.3)"), more == ["--full"], "{text}");
        }
    }
}

/// Every case that people can read, in the widths that its numbers have.
#[test]
fn no_walk_is_wider_than_eighty_columns() {
    let mut walked = 0;
    for (subject, spec) in specs() {
        let Ok(walk) = Walk::of(&subject.draw(spec, 0)) else { continue };
        let text = walk.to_string();
        let wide: Vec<_> = text.lines().filter(|line| columns(line) > 80 && !line.starts_with('{')).collect();
        assert!(wide.is_empty(), "{}: {wide:?}", spec.name);
        walked += 1;
    }
    assert!(walked > 80, "{walked}");
}

/// What the README prints is what the command prints.
#[test]
fn the_readme_shows_what_is_said() {
    let readme = include_str!("../README.md");
    let (_, block) = readme.split_once("```text\nForward by the definition").expect("the excerpt");
    let (block, _) = block.split_once("```").expect("its end");
    let text = said(&["explain", "linear", "--full"]);
    // How uncertain a difference is depends on the processor's products.
    let shown: Vec<&str> = block.lines().skip(1).filter(|line| *line != "..." && !line.contains("e-")).collect();
    assert!(shown.len() > 8);
    for line in shown {
        assert!(text.lines().any(|said| said == line), "{line}");
    }
}

/// A formula reads as its line is computed: under a mask, per input, and where a lookup passes on only a part.
#[test]
fn formulas_read_as_the_circumstances_are() {
    let formula = |name: &str, label: &str, quantity: &str| {
        let (subject, spec) = specs().find(|(_, spec)| spec.name == name).expect("a case");
        let walk = Walk::of(&subject.draw(spec, 0)).expect("a walk");
        let step = walk.steps.iter().find(|step| step.label == label && step.quantity == quantity);
        step.map(|step| step.formula).expect("a line")
    };
    assert_eq!(formula("linear-plain", "E15", "u"), "u = x̃");
    assert_eq!(formula("linear-plain", "E14", "<W0, BA>"), "<W0, Δ> = (W0 Aᵀ) · B");
    assert_eq!(formula("linear-plain", "E145", "dV"), "dV = g dW'");
    assert_eq!(formula("linear-full", "E145", "dV"), "dV = g dW' + k V, k = -(c / n) (g / ‖V‖)");
    assert_eq!(formula("linear-dropout", "E13", "y"), "y = op(x, W0) + op(x̃, W' - W0) + b");
    let lora = specs().find(|(layer, spec)| layer.name() == "linear" && !spec.config.has_norm()).expect("LoRA").1.name;
    assert_eq!(formula(lora, "E145", "dV"), "dV = g dW'");
    let row = |spec: &&woracle::cases::Spec| spec.config.norm_axis == NormAxis::Input && spec.config.has_norm();
    let per_input = specs().map(|(_, spec)| spec).find(row).expect("per input").name;
    assert_eq!(formula(per_input, "E15", "u"), "u = g x̃");
    assert_eq!(formula(per_input, "E14", "<W0, BA>"), "<W0, Δ> = (W0ᵀ B) · Aᵀ");
}

/// The final line of every quantity is what the layer hands out, by either way, in every case that people can read.
#[test]
fn what_is_shown_is_what_the_layer_hands_out() {
    use Chapter::{Definition, DefinitionBackward, Factored, FactoredBackward, ThroughNorm};
    let (mut cases, mut compared) = (0, 0);
    for (subject, spec) in specs() {
        let case = subject.draw(spec, 1);
        let Ok(walk) = Walk::of(&case) else { continue };
        let produced = subject.evaluate(&case, Precision::F64).expect("results");
        let defined = subject.define(&case).expect("results");
        let [a, b] = subject.lora_names().map(|name| format!("grad.{name}"));
        let quantities = [
            ("y", "y"),
            ("g", "gain"),
            ("dx", "grad.x"),
            ("db", "grad.base.bias"),
            ("dW0", "grad.base.weight"),
            ("dm", "grad.lora_magnitude_vector"),
            ("dalpha", "grad.lora_wora_alpha"),
            ("dbeta", "grad.lora_wora_beta"),
            ("dA", &a),
            ("dB", &b),
        ];
        for (quantity, name) in quantities {
            let ways = [
                (&defined, &[Definition, DefinitionBackward][..]),
                (&produced, &[Factored, FactoredBackward, ThroughNorm]),
            ];
            for (results, chapters) in ways {
                let (Some(result), Some(step)) = (results.get(name), walk.last(quantity, chapters)) else { continue };
                // An embedding's matrices are its tables transposed.
                let sorted = |values: &ndarray::ArrayD<f64>| {
                    let mut values: Vec<f64> = values.iter().copied().collect();
                    values.sort_by(f64::total_cmp);
                    values
                };
                assert_eq!(sorted(&step.values), sorted(result), "{name} by {} in {}", step.label, spec.name);
                compared += 1;
            }
        }
        cases += 1;
    }
    assert!(cases > 80 && compared > 1200, "{cases} cases, {compared} quantities");
}

#[test]
fn identities_hold_and_slopes_agree_in_drawn_shapes() {
    let example = &examples()[0];
    let shape = Shape { x: vec![3, 5], weight: vec![4, 5], rank: 2 };
    let explanation = Explanation::of(&drawn(example, Some(shape), 3).expect("a case")).expect("an explanation");
    assert_eq!(explanation.identities.len(), 6);
    assert!(explanation.identities.iter().all(|identity| identity.verdict == Verdict::Agree));
    let slopes: Vec<_> = explanation.slopes.iter().flat_map(|slopes| &slopes.elements).collect();
    assert_eq!(slopes.len(), 15 + 20 + 4 + 10 + 8 + 4 + 1 + 1);
    for slope in slopes {
        assert!((slope.ours - slope.dual).abs() < 1e-13 && (slope.ours - slope.difference).abs() < 1e-10, "{slope:?}");
    }
}

#[test]
fn a_page_needs_nothing_from_elsewhere() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("linear.html");
    said(&["explain", "linear-dropout-full", "--html", path.to_str().expect("text")]);
    let page = fs::read_to_string(&path).expect("a page");
    assert!(page.contains("<math display=\"block\">") && page.contains("E31"));
    let (_, slopes) = page.split_once("<code>grad.lora_wora_beta</code></h3>").expect("the slopes of beta");
    let (slopes, _) = slopes.split_once("</table>").expect("a table");
    assert!(slopes.contains("by differences") && slopes.matches("<td class=\"number\">").count() == 4, "{slopes}");
    for never in ["<script", "http", "src=", "@import", "<merror"] {
        assert!(!page.contains(never), "{never}");
    }
}

#[test]
fn what_cannot_be_explained_gets_one_line() {
    let table: &[(&[&str], &str)] = &[
        (&["explain", "relu"], "LAYER: expected linear, embedding, conv1d, conv2d, conv3d, a case of a layer"),
        (&["explain", "linear", "--shape", "2x4", "3x5", "1"], "x: expected shape [..., 5], found [2, 4]"),
        (&["explain", "linear", "--shape", "2x4", "3x4", "0"], "--shape: expected three shapes of 1 to 1000 numbers"),
        (&["explain", "linear", "--shape", "2x4", "3x4", "1x1"], "--shape: expected a rank, such as 1, found 1x1"),
        (&["explain", "linear", "--shape", "2y4", "3x4", "1"], "--shape: expected three shapes, such as"),
        (&["explain", "linear", "--shape", "99999999999x9999999999", "3x4", "1"], "--shape: expected three shapes of"),
        (&["explain", "linear-plain", "--shape", "2x4", "3x4", "1"], "layer for --shape: expected linear,"),
        (&["explain", "linear-large"], "expected at most 1000 numbers in all tensors"),
        (&["explain", "no-such.safetensors"], "no-such.safetensors: "),
        (&["explain", "linear", "--html", "no/such/directory.html"], "no/such/directory.html: "),
    ];
    for (arguments, expected) in table {
        let output = wora(arguments);
        let line = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {line}");
        assert!(line.contains(expected) && line.trim_end().lines().count() == 1, "{arguments:?}: {line}");
    }
}

/// E13, E44, E39 and E47 of what is shown: y is W' on the columns X, and C is W'^T on dy, group by group.
#[test]
fn columns_lie_between_x_and_y() {
    let [mut outputs, mut gradients, mut masked] = [0, 0, 0];
    for (subject, spec) in specs() {
        let case = subject.draw(spec, 2);
        let Ok(walk) = Walk::of(&case) else { continue };
        let shown = |quantity| walk.last(quantity, &[Chapter::Definition, Chapter::DefinitionBackward]);
        let Some(x) = shown("X") else { continue };
        if case.tensors.contains_key("dropout_mask") {
            // What is read under a mask is what is read of the masked input; y reads the whole of it beside.
            let mut plain = case.clone();
            let kept = case.values("x").expect("x") * case.values("dropout_mask").expect("a mask");
            plain.tensors.remove("dropout_mask");
            plain.tensors.insert("x".into(), Tensor::Float(kept.into()));
            let plain = Walk::of(&plain).expect("a walk");
            assert_eq!(x.values, plain.last("X", &[Chapter::Definition]).expect("X").values, "{}", spec.name);
            assert!(shown("C").is_none());
            masked += 1;
            continue;
        }
        assert_eq!(shown("C").is_some(), case.layer != "embedding", "ids have no gradient: {}", spec.name);
        let [outer, all, inner] = *x.values.shape() else { panic!("{:?}", x.values.shape()) };
        let weight = &shown("W'").expect("W'").values;
        let (units, fan_in) = (weight.shape()[0], weight.shape()[1]);
        let in_group = units / (all / fan_in);
        let bias = case.optional("base.bias").expect("values");
        let y: Vec<f64> = shown("y").expect("y").values.iter().copied().collect();
        let dy: Vec<f64> = case.values("grad.y").expect("dy").iter().copied().collect();
        // An embedding's outputs lie as `[outer, units]`, as others' with one place each.
        let at = |i: usize, unit: usize, j: usize| (i * units + unit) * inner + j;
        assert_eq!(y.len(), outer * units * inner);
        for i in 0..outer {
            for j in 0..inner {
                for unit in 0..units {
                    let first = unit / in_group * fan_in;
                    let sum: f64 = (0..fan_in).map(|k| weight[[unit, k]] * x.values[[i, first + k, j]]).sum();
                    let expected = sum + bias.as_ref().map_or(0.0, |bias| bias[[unit]]);
                    assert!((y[at(i, unit, j)] - expected).abs() < 1e-12, "{}", spec.name);
                    outputs += 1;
                }
                let Some(c) = shown("C") else { continue };
                for row in 0..all {
                    let group = row / fan_in;
                    let of_group = group * in_group..(group + 1) * in_group;
                    let expected: f64 = of_group.map(|unit| weight[[unit, row % fan_in]] * dy[at(i, unit, j)]).sum();
                    assert!((c.values[[i, row, j]] - expected).abs() < 1e-12, "{}", spec.name);
                    gradients += 1;
                }
            }
        }
    }
    assert!(outputs > 1000 && gradients > 1000, "{outputs} outputs, {gradients} gradients of columns");
    assert!(masked > 2, "{masked} under a mask");
}

/// Every line that can be told is, and those of the learned scalars where there are any.
#[test]
fn every_line_is_shown() {
    let mut shown = BTreeSet::new();
    for (subject, spec) in specs() {
        let Ok(walk) = Walk::of(&subject.draw(spec, 3)) else { continue };
        for chapter in Chapter::ALL {
            let steps: Vec<_> = walk.steps.iter().filter(|step| step.chapter == chapter).collect();
            let wanted = spec.config.method == Method::Wora && steps.iter().any(|step| step.quantity == "dB");
            for scalar in ["dalpha", "dbeta"] {
                let told = steps.iter().any(|step| step.quantity == scalar);
                assert_eq!(told, wanted, "{scalar} in {chapter:?} of {}", spec.name);
            }
        }
        shown
            .extend(walk.steps.iter().map(|step| format!("{:?}, {:?}, {:?}", step.chapter, step.label, step.quantity)));
    }
    let listed = include_str!("../src/explain/lines.rs").lines().filter_map(|line| line.trim().strip_prefix("line("));
    let listed: Vec<&str> = listed.collect();
    assert!(listed.len() > 40);
    for line in listed {
        let start = line.splitn(4, ", ").take(3).collect::<Vec<_>>().join(", ");
        // A quantity such as <W0, BA> has a comma of its own.
        assert!(shown.iter().any(|shown| shown.starts_with(&start)), "{line}");
    }
}

/// E18: H, which no result is made of in every case.
#[test]
fn the_gained_cotangent_is_what_it_says() {
    let mut compared = 0;
    for (subject, spec) in specs() {
        let case = subject.draw(spec, 4);
        let Ok(walk) = Walk::of(&case) else { continue };
        let Some(h) = walk.last("H", &[Chapter::FactoredBackward]) else { continue };
        let dy = case.values("grad.y").expect("dy");
        let gain = walk.last("g", &[Chapter::Factored]).filter(|_| spec.config.norm_axis == NormAxis::Output);
        let [_, units, inner] = *h.values.shape() else { panic!("{:?}", h.values.shape()) };
        for (at, (h, dy)) in h.values.iter().zip(dy.iter()).enumerate() {
            let gain = gain.map_or(1.0, |gain| gain.values[[at / inner % units]]);
            assert!((h - gain * dy).abs() <= 1e-14 * h.abs(), "{}", spec.name);
            compared += 1;
        }
    }
    assert!(compared > 1000);
}
