//! `wora report`: a page that needs nothing but itself, on which nothing is missing and nothing wrong looks right.

mod command;

use command::wora;
use std::f64::consts::TAU;
use std::sync::OnceLock;
use woracle::gradcheck::{Trial, Tried, Witness, check_mistake};
use woracle::mistakes::{MISTAKES, mistake};
use woracle::registry::layer;
use woracle::report::{HeatMap, Matrix, Plan, Report, curve_at, picture};

const CASES: [&str; 6] =
    ["linear-plain", "linear-full", "linear-dora", "embedding-full", "conv1d-plain", "module-layer_norm"];

/// A report of a few cases and mistakes.
fn report() -> &'static Report {
    static REPORT: OnceLock<Report> = OnceLock::new();
    REPORT.get_or_init(|| {
        let mut plan = Plan::everything(3);
        plan.cases.retain(|entry| CASES.contains(&entry.name()));
        plan.mistakes.retain(|mistake| ["norm-detached", "delta-transposed"].contains(&mistake.id));
        plan.epochs = 2;
        let done = std::sync::Mutex::new(0);
        let report = Report::gather(&plan, &|_| *done.lock().expect("a count") += 1).expect("a report");
        assert_eq!(*done.lock().expect("a count"), plan.parts());
        report
    })
}

#[test]
fn the_page_needs_nothing_but_itself() {
    let html = report().to_html();
    let without_namespaces =
        html.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1998/Math/MathML", "");
    for outside in ["http", "<script", " src=", "@import", "url(", "<link rel=\"stylesheet"] {
        assert!(!without_namespaces.contains(outside), "{outside}");
    }
    assert!(html.contains("<math") && !html.contains("<merror"));
    assert!(html.contains("prefers-color-scheme: dark") && html.contains("@media print"));
}

#[test]
fn every_picture_has_words_and_axes() {
    let html = report().to_html();
    let pictures: Vec<&str> = html.split("<svg").skip(1).map(|rest| rest.split("</svg>").next().unwrap()).collect();
    assert_eq!(pictures.len(), report().v_curves.curves.len() + 4 + 1);
    for picture in pictures {
        assert!(picture.contains("role=\"img\"") && picture.contains("<title>") && picture.contains("<desc>"));
        // Nothing that cannot be seen on one of the two grounds.
        assert!(picture.contains("currentColor") && !picture.contains("#000000") && !picture.contains("#FFFFFF"));
        assert!(picture.matches("<text").count() > 8, "no labels");
        let after = |text: &str, key: &str| -> Vec<f64> {
            let (_, rest) = text.split_once(&format!("{key}=\"")).expect("an attribute");
            rest.split('"').next().unwrap().split(' ').map(|number| number.parse().expect("a number")).collect()
        };
        let size = after(picture, "viewBox");
        for text in picture.split("<text").skip(1) {
            let (x, y) = (after(text, " x")[0], after(text, " y")[0]);
            assert!((0.0..=size[2]).contains(&x) && (0.0..=size[3]).contains(&y), "{x}, {y}: outside");
        }
    }
    let curves = &report().v_curves.curves;
    assert_eq!(html.matches("The best single difference, at h = ").count(), 2 * curves.len());
    assert!(html.contains("step h, in the element") && html.contains("alpha, without a unit"));
}

#[test]
fn the_heat_map_has_a_cell_for_every_tensor() {
    let (heat_map, html) = (&report().heat_map, report().heat_map.to_html());
    let cases: Vec<_> = heat_map.groups.iter().flat_map(|group| &group.cases).collect();
    assert_eq!(cases.len(), CASES.len());
    for tensor in cases.iter().flat_map(|case| &case.tensors) {
        let with = cases.iter().filter(|case| case.tensor(&tensor.name).is_some()).count();
        assert_eq!(html.matches(&format!("title=\"{}: agree", tensor.name)).count(), with, "{}", tensor.name);
    }
    assert!(heat_map.agrees() && report().is_right() && !html.contains("<td class=\"disagree"));
    assert!(heat_map.summary().starts_with("6 of 6 cases agree; of their tensors "), "{}", heat_map.summary());
    let tensors: usize = cases.iter().map(|case| case.tensors.len()).sum();
    assert!(heat_map.summary().ends_with(&format!(" {tensors} agree, 0 disagree, 0 are unresolved")));
    // Every cell says how much of its budget is used up: "=", or a power of ten.
    for cell in html.split("<span class=\"hidden\">agree </span>").skip(1) {
        let text = cell.split('<').next().expect("a text");
        assert!(text.ends_with('=') || text.ends_with(|last: char| last.is_ascii_digit()), "{text}");
    }
    assert!(!report().complete && report().to_html().contains("a part of all cases"));
}

#[test]
fn a_broken_gradient_is_red() {
    let linear = layer("linear").expect("linear");
    let spec = linear.specs().iter().find(|spec| spec.name == "linear-full").expect("a case");
    let wrong = check_mistake(mistake("norm-detached").expect("an id"), linear, &linear.draw(spec, 0), 0);
    let heat_map = HeatMap::of(vec![("linear", wrong.expect("a check").expect("another gradient"))]);
    let html = heat_map.to_html();
    assert!(!heat_map.agrees() && heat_map.summary().starts_with("0 of 1 cases agree"), "{}", heat_map.summary());
    assert!(!heat_map.summary().contains(" 0 disagree") && heat_map.summary().contains(" 0 are unresolved"));
    assert!(html.contains("<td class=\"disagree\" title=\"grad.lora_wora_alpha: disagree"));
    assert!(html.contains("title=\"y: agree"), "the forward is right");
    assert!(!HeatMap::of(vec![]).agrees(), "nothing that was checked is no success");
}

#[test]
fn a_mistake_that_survives_is_said() {
    let (mistake, layer) = (&MISTAKES[0], "linear");
    let trial = Trial { mistake: mistake.id, layer, case: None, killed_by: vec![], tried: 3 };
    let matrix = Matrix { rows: vec![Tried { mistake, trials: vec![trial] }] };
    assert!(!matrix.all_killed() && matrix.to_html().contains("<td class=\"disagree\">survives"));
    assert!(report().mistakes.all_killed() && !report().mistakes.to_html().contains("survives</td>"));
}

#[test]
fn a_curved_path_makes_a_v_and_an_affine_one_does_not() {
    let curved = curve_at("linear-full/lora_wora_alpha", 0).expect("a curve");
    let tip = (0..curved.steps.len()).min_by(|&a, &b| curved.steps[a].error.total_cmp(&curved.steps[b].error));
    let tip = tip.expect("steps");
    assert!((5..curved.steps.len() - 5).contains(&tip), "{tip}");
    // Half the step, a quarter of the error.
    for pair in curved.steps[7..11].windows(2) {
        let ratio = pair[0].error / pair[1].error;
        assert!((3.5..4.5).contains(&ratio), "{ratio}");
    }
    assert!(curved.steps.last().expect("steps").error > 1e6 * curved.steps[tip].error, "rounding");
    assert!((curved.ladder - curved.dual).abs() < curved.steps[tip].error.min(curved.uncertainty));
    assert!((curved.ours - curved.dual).abs() < 1e-13);
    let affine = curve_at("linear-plain/lora_A/2,1", 0).expect("a curve");
    assert_eq!(affine.index, [2, 1]);
    assert!(affine.steps[0].error < 1e-13, "no curvature: {:?}", affine.steps[0]);
    assert_eq!(curve_at("linear-plain/lora_A/15", 0).expect("a curve").index, [2, 1]);
}

#[test]
fn the_loss_is_the_same_along_a_ray_and_only_the_full_gradient_knows() {
    let plane = &report().plane;
    assert!(plane.spread < 1e-13, "{}", plane.spread);
    let losses: Vec<f64> = plane.rays.iter().map(|ray| ray.loss).collect();
    assert!(losses.iter().fold(0.0, |a: f64, &b| a.max(b)) > 1.0, "a picture without a difference");
    for (number, ray) in plane.rays.iter().enumerate() {
        approx::assert_relative_eq!(ray.angle, TAU * number as f64 / losses.len() as f64);
    }
    for arrow in &plane.arrows {
        let radial = |gradient: (f64, f64)| arrow.point.0 * gradient.0 + arrow.point.1 * gradient.1;
        let size = arrow.detached.0.hypot(arrow.detached.1);
        assert!(radial(arrow.full).abs() < 1e-12 * size, "{arrow:?}");
        assert!(radial(arrow.detached).abs() > 1e-3 * size, "{arrow:?}");
        assert!((radial(arrow.detached) - arrow.along).abs() < 1e-12 * size, "{arrow:?}");
    }
}

#[test]
fn training_with_the_full_gradient_keeps_the_length_of_alpha_and_beta() {
    let change = |number: usize| {
        let length = report().training.ways[number].length("fc1");
        (length.last().expect("a point").1 - length[0].1).abs()
    };
    let (detached, full) = (change(0), change(1));
    assert!(full < 0.02 && detached > 5.0 * full, "{full} against {detached}");
    assert!(report().training.holds());
}

#[test]
fn what_cannot_be_reported_is_one_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    let out = at("report.html");
    let paths = [
        ("linear-fool/lora_A", "linear-fool"),
        ("module-layer_norm/weight", "module-layer_norm"),
        ("linear-full/lora_C", "lora_C"),
        ("linear-full/lora_A/99", "expected an element of lora_A, of shape [3, 7]"),
        ("linear-full/lora_A/0,7", "linear-full/lora_A/0,7"),
        ("linear-full", "expected CASE/TENSOR"),
    ];
    let path = |(path, says): (&str, &'static str)| (vec![out.clone(), "--path".into(), path.into()], says);
    let mut wrong: Vec<(Vec<String>, &str)> = paths.into_iter().map(path).collect();
    wrong.push((vec![at("missing/report.html")], "missing"));
    wrong.push((vec![at("")], "found a directory"));
    wrong.push((vec![out.clone(), "--threads".into(), "0".into()], "--threads"));
    for (arguments, says) in wrong {
        let arguments: Vec<&str> = ["report"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
        let (code, stdout, stderr) = wora(&arguments);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(stderr.lines().count() == 1 && stderr.contains(says), "{arguments:?}: {stderr}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).expect("entries").count(), 0, "something is left behind");
}

/// What is drawn under a name is what the name says.
#[test]
fn every_series_is_drawn_under_its_own_name() {
    let curve = curve_at("linear-full/lora_wora_alpha", 0).expect("a curve");
    let drawn = picture(&curve);
    let level = |name: &str| drawn.points(name).expect("a series")[0].1;
    assert_eq!(level("ladder: what it allows for"), curve.uncertainty);
    assert_eq!(level("ladder: error"), (curve.ladder - curve.dual).abs());
    assert_eq!(level("dual number: its distance from the derived gradient"), (curve.ours - curve.dual).abs());
    let steps: Vec<_> = curve.steps.iter().map(|rung| (rung.step, rung.error)).collect();
    assert_eq!(drawn.points("central difference"), Some(&steps[..]));

    let plane = &report().plane;
    let drawn = plane.picture();
    let svg = drawn.to_svg();
    let labels = |text: &str| svg.matches(&format!("\n{text}\n")).count();
    assert_eq!(["\u{2212}2", "0", "2"].map(labels), [2; 3], "the origin is in the middle of both axes");
    assert_eq!(labels("Loss over alpha and beta, and steps downhill"), 1);
    let inclinations = |name: &str| -> Vec<f64> {
        let steps = drawn.points(name).expect("a series").chunks(2);
        steps.map(|step| step[0].0 * (step[1].0 - step[0].0) + step[0].1 * (step[1].1 - step[0].1)).collect()
    };
    let (full, detached) = (inclinations("step, full gradient"), inclinations("step, detached gradient"));
    assert_eq!((full.len(), detached.len()), (plane.arrows.len(), plane.arrows.len()));
    assert!(full.iter().all(|lean| lean.abs() < 1e-12), "along the circle: {full:?}");
    for (lean, arrow) in detached.iter().zip(&plane.arrows) {
        // A step goes against its gradient.
        let radial = arrow.point.0 * arrow.detached.0 + arrow.point.1 * arrow.detached.1;
        assert!(lean * radial <= 0.0 && (radial.abs() < 1e-9 || *lean != 0.0), "{arrow:?}");
    }

    let training = &report().training;
    let [(loss, _), (validation, _), ..] = training.pictures();
    for (name, way) in ["detached", "full gradient"].into_iter().zip(&training.ways) {
        assert_eq!(loss.points(name), Some(&way.loss[..]));
        assert_eq!(validation.points(name), Some(&way.validation[..]));
    }
    assert_ne!(training.ways[0].loss, training.ways[1].loss);

    let html = report().heat_map.to_html();
    let header = |name: &str, head: &str| html.contains(&format!("<th scope=\"col\" title=\"{name}\">{head}</th>"));
    for (name, head) in [("x", "dx"), ("base.weight", "dW\u{2080}"), ("lora_A", "dA"), ("lora_wora_beta", "d\u{3b2}")] {
        assert!(header(name, head), "{name} under {head}");
    }
}

/// The witnesses of one mistake stand under their own heads.
#[test]
fn a_square_is_filled_for_the_witness_that_saw_the_mistake() {
    let html = report().mistakes.to_html();
    for row in &report().mistakes.rows {
        for trial in &row.trials {
            for witness in [Witness::Definition, Witness::Differences, Witness::Duals, Witness::Identities] {
                let saw = trial.killed_by.contains(&witness);
                let line = html.lines().find(|line| line.contains(&format!("<code>{}</code>", row.mistake.id)));
                let line = line.unwrap_or_else(|| panic!("no row of {}", row.mistake.id));
                let cell =
                    line.split("<td").find(|cell| cell.contains(&format!("title=\"{witness}: "))).expect("a cell");
                let words = cell.split("title=\"").nth(1).and_then(|rest| rest.split('"').next()).expect("words");
                assert_eq!(words.contains(trial.layer), saw, "{} {witness}: {words}", row.mistake.id);
            }
        }
    }
}

#[test]
fn a_total_counts_the_mistakes_that_a_witness_saw() {
    let trial = |mistake: usize, killed_by: &[Witness]| {
        let (mistake, killed_by) = (&MISTAKES[mistake], killed_by.to_vec());
        let trial = Trial { mistake: mistake.id, layer: "linear", case: None, killed_by, tried: 3 };
        Tried { mistake, trials: vec![trial] }
    };
    let (by_definition, by_duals) = (&[Witness::Definition][..], &[Witness::Definition, Witness::Duals]);
    let matrix = Matrix { rows: vec![trial(0, by_definition), trial(1, by_duals), trial(2, by_definition)] };
    let html = matrix.to_html();
    let (_, totals) = html.split_once("<tfoot>").expect("totals");
    let totals: Vec<usize> = totals
        .split("<td>")
        .skip(1)
        .filter_map(|cell| cell.split('<').next().and_then(|text| text.parse().ok()))
        .collect();
    let count = |witness: &Witness| matrix.rows.iter().filter(|row| row.contradicted_by(*witness) > 0).count();
    let expected: Vec<usize> = Tried::WITNESSES.iter().map(count).collect();
    assert_eq!(totals[..expected.len()], expected);
    assert!(expected.contains(&3) && expected.contains(&1) && expected.contains(&0));
}
