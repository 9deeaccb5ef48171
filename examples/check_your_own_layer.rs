//! A layer of your own under the gradient checker: RMS normalisation, once right and once with a classic mistake.
//!
//! Forward, with `r_n = sqrt(mean_j x_nj^2 + eps)`:
//!
//! ```text
//! y_nj = w_j x_nj / r_n
//! ```
//!
//! Backward, with `h_nj = w_j dy_nj` and F features:
//!
//! ```text
//! dx_nj = h_nj / r_n  -  x_nj (sum_k h_nk x_nk) / (F r_n^3)
//! dw_j  = sum_n dy_nj x_nj / r_n
//! ```
//!
//! The second term of dx comes through the mean square. Forgetting it is easy: the rest is what a plain scaling has.
//!
//! `cargo run --release --example check_your_own_layer`

use ndarray::{Array1, ArrayD, Axis};
use std::process::ExitCode;
use woracle::case::Tensors;
use woracle::gradcheck::{Function, Options, Verdict, gradcheck};
use woracle::{Dual, DualTensors, Real, Result};

const EPS: f64 = 1e-6;

/// Generic over the number: on f64 it is the forward, on dual numbers it differentiates itself.
fn rms_norm<R: Real>(x: &ArrayD<R>, w: &ArrayD<R>) -> ArrayD<R> {
    let mut y = x.clone();
    for mut row in y.rows_mut() {
        let r = root_mean_square(row.iter().copied());
        row.iter_mut().zip(w).for_each(|(value, &w)| *value = w * *value / r);
    }
    y
}

fn root_mean_square<R: Real>(row: impl ExactSizeIterator<Item = R>) -> R {
    let features = R::constant(row.len() as f64);
    let squares = row.fold(R::constant(0.0), |sum, x| sum + x * x);
    (squares / features + R::constant(EPS)).sqrt()
}

struct RmsNorm {
    name: &'static str,
    through_the_mean_square: bool,
}

impl Function for RmsNorm {
    fn name(&self) -> &str {
        self.name
    }

    fn forward(&self, inputs: &Tensors) -> Result<ArrayD<f64>> {
        Ok(rms_norm(&inputs["x"], &inputs["w"]))
    }

    fn backward(&self, inputs: &Tensors, dy: &ArrayD<f64>) -> Result<Tensors> {
        let (x, w) = (&inputs["x"], &inputs["w"]);
        let (mut dx, mut dw) = (dy * w, Array1::<f64>::zeros(w.len()));
        for ((mut dx, x), dy) in dx.rows_mut().into_iter().zip(x.rows()).zip(dy.rows()) {
            let r = root_mean_square(x.iter().copied());
            dw.scaled_add(1.0 / r, &(&dy * &x));
            let h_dot_x = dx.dot(&x); // dx still holds h here
            dx /= r;
            if self.through_the_mean_square {
                dx.scaled_add(-h_dot_x / (x.len() as f64 * r.powi(3)), &x);
            }
        }
        Ok(Tensors::from([("x".to_string(), dx), ("w".to_string(), dw.into_dyn())]))
    }

    // The second witness. It costs one line, and needs no step.
    fn forward_dual(&self, inputs: &DualTensors) -> Result<Option<ArrayD<Dual>>> {
        Ok(Some(rms_norm(&inputs["x"], &inputs["w"])))
    }

    // y is linear in w alone: differences may take one large step. x divides by its own size.
    fn is_affine(&self, input: &str) -> bool {
        input == "w"
    }
}

fn main() -> Result<ExitCode> {
    // Rows of different sizes, none of them special: at zero, or at equal features, terms vanish and mistakes hide.
    let mut x = ArrayD::from_shape_fn(vec![4, 6], |at| ((5 * at[0] + 3 * at[1]) as f64).sin());
    x.axis_iter_mut(Axis(0)).enumerate().for_each(|(row, mut values)| values *= 0.5 + row as f64);
    let w = ArrayD::from_shape_fn(vec![6], |at| 1.0 + 0.25 * at[0] as f64);
    let inputs = Tensors::from([("x".to_string(), x), ("w".to_string(), w)]);

    let right = RmsNorm { name: "rms norm", through_the_mean_square: true };
    let mistaken = RmsNorm { name: "rms norm without the term through r", through_the_mean_square: false };
    let right = gradcheck(&right, &inputs, Options::default());
    let mistaken = gradcheck(&mistaken, &inputs, Options::default());
    println!("{right}\n\n{mistaken}");

    // Not to agree is not yet to disagree: an unresolved tensor is no finding.
    let found = mistaken.tensors.iter().any(|tensor| tensor.verdict == Verdict::Disagree);
    Ok(if right.agrees() && found { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
