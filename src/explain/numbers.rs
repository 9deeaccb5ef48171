//! Arrays as people read and write them: nested brackets, one row a line where a line does not hold them.

use ndarray::{ArrayD, ArrayViewD, Axis};

/// As many digits as a reader follows.
const DIGITS: usize = 6;

/// A number with at most six digits: whole, or the shortest that says it, or rounded.
pub(super) fn number(value: f64) -> String {
    let exact = (value + 0.0).to_string();
    let digits = exact.chars().filter(char::is_ascii_digit).collect::<String>();
    if !value.is_finite() || digits.trim_start_matches('0').len() <= DIGITS && exact.len() <= DIGITS + 4 {
        return exact;
    }
    let exponent = value.abs().log10().floor() as i32;
    if (-4..DIGITS as i32).contains(&exponent) {
        let decimals = (DIGITS as i32 - 1 - exponent).max(0) as usize;
        let rounded = format!("{value:.decimals$}");
        return if rounded.contains('.') {
            rounded.trim_end_matches('0').trim_end_matches('.').to_string()
        } else {
            rounded
        };
    }
    format!("{value:.*e}", DIGITS - 1)
}

/// The lengths of a shape with this between them.
pub(super) fn shape(lengths: &[usize], by: &str) -> String {
    if lengths.is_empty() {
        return "scalar".into();
    }
    lengths.iter().map(ToString::to_string).collect::<Vec<_>>().join(by)
}

/// An array of numbers in brackets, in lines of at most `width` characters where its rows allow it.
pub(super) fn lines(values: ArrayViewD<'_, f64>, width: usize) -> Vec<String> {
    let texts = values.mapv(number);
    let line = on_one_line(texts.view(), 0);
    if line.chars().count() <= width || values.ndim() < 2 {
        return wrapped(&line, width);
    }
    let widest = texts.iter().map(String::len).max().unwrap_or(0);
    by_rows(texts.view(), widest, width)
}

fn on_one_line(texts: ArrayViewD<'_, String>, pad: usize) -> String {
    match texts.ndim() {
        0 => format!("{:>pad$}", texts[[]]),
        1 => format!("[{}]", texts.iter().map(|text| format!("{text:>pad$}")).collect::<Vec<_>>().join(", ")),
        _ => {
            let parts = texts.axis_iter(Axis(0)).map(|part| on_one_line(part, pad));
            format!("[{}]", parts.collect::<Vec<_>>().join(", "))
        }
    }
}

/// One innermost row a line.
fn by_rows(texts: ArrayViewD<'_, String>, pad: usize, width: usize) -> Vec<String> {
    if texts.ndim() < 2 {
        return wrapped(&on_one_line(texts, pad), width);
    }
    let (last, mut lines) = (texts.len_of(Axis(0)) - 1, Vec::new());
    for (nth, part) in texts.axis_iter(Axis(0)).enumerate() {
        // A bracket before it, a bracket or a comma behind it.
        let of_part = by_rows(part, pad, width.saturating_sub(2));
        let end = of_part.len() - 1;
        lines.extend(of_part.into_iter().enumerate().map(|(at, line)| {
            let open = if nth == 0 && at == 0 { '[' } else { ' ' };
            let close = if at < end {
                ""
            } else if nth == last {
                "]"
            } else {
                ","
            };
            format!("{open}{line}{close}")
        }));
    }
    lines
}

/// A line broken after commas.
fn wrapped(line: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in line.split_inclusive(", ") {
        let last = lines.last().expect("a line");
        if !last.is_empty() && last.len() + word.trim_end().len() > width {
            lines.push(" ".into());
        }
        lines.last_mut().expect("a line").push_str(word);
    }
    lines.into_iter().map(|line| line.trim_end().to_string()).collect()
}

/// An array from nested brackets; `None` where they are none, or not of one shape.
pub(super) fn parse(text: &str) -> Option<ArrayD<f64>> {
    fn add(value: &serde_json::Value, depth: usize, shape: &mut Vec<usize>, values: &mut Vec<f64>) -> Option<()> {
        let serde_json::Value::Array(parts) = value else {
            values.push(value.as_f64()?);
            return (depth == shape.len()).then_some(());
        };
        if shape.len() == depth && values.is_empty() {
            shape.push(parts.len());
        }
        if shape.get(depth) != Some(&parts.len()) {
            return None;
        }
        parts.iter().try_for_each(|part| add(part, depth + 1, shape, values))
    }
    let (mut shape, mut values) = (Vec::new(), Vec::new());
    add(&serde_json::from_str(text).ok()?, 0, &mut shape, &mut values)?;
    ArrayD::from_shape_vec(shape, values).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn numbers_are_short_and_brackets_can_be_read_again() {
        assert_eq!([0.0, -0.0, -3.0, 0.375, 1234567.0].map(number), ["0", "0", "-3", "0.375", "1.23457e6"]);
        assert_eq!([1.0 / 3.0, -2e-7 / 3.0, 12.0 + 1.0 / 3.0].map(number), ["0.333333", "-6.66667e-8", "12.3333"]);
        for values in [array![[1.0, -2.5], [0.0, 4.0]].into_dyn(), array![[[1.0], [2.0]]].into_dyn()] {
            for width in [80, 12] {
                let text = lines(values.view(), width);
                assert!(text.iter().all(|line| line.len() <= width));
                assert_eq!(parse(&text.concat()).as_ref(), Some(&values));
            }
        }
        let column = array![[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0]].into_dyn();
        assert_eq!(lines(column.view(), 22).len(), 7, "one row a line");
        assert_eq!(lines(column.view(), 80), ["[[1], [2], [3], [4], [5], [6], [7]]"]);
        assert_eq!(parse("[[1, 2], [3]]"), None);
        assert_eq!(parse("[1, [2]]"), None);
    }
}
