//! Mutants beside what they replace: `(match active() { mutant if none of this place => (original), 17 => (mutated), .. })`.

use crate::{Mutant, Place};
use proc_macro2::LineColumn;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// What reads the switch; it becomes a module of the crate.
pub const SWITCH: &str = r#"
#[doc(hidden)]
pub mod mutant {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    static ACTIVE: AtomicUsize = AtomicUsize::new(usize::MAX);
    /// The number of the mutant that this process has, 0 for none.
    #[inline(always)]
    pub fn active() -> usize {
        let active = ACTIVE.load(Relaxed);
        if active == usize::MAX { first() } else { active }
    }
    #[cold]
    fn first() -> usize {
        let active = std::env::var("MUTANT").map_or(0, |number| number.parse().expect("MUTANT: a number"));
        ACTIVE.store(active, Relaxed);
        active
    }
}
"#;

/// Something that has mutants: what each makes of it.
#[derive(Debug)]
struct Node {
    range: Range<usize>,
    kind: Kind,
    arms: Vec<(usize, String)>,
}

#[derive(Debug, PartialEq, Clone, Copy)]
enum Kind {
    /// An expression, of which there is one of several.
    Choice,
    /// Statements before others.
    Insert,
    /// A function, which stays as it is: what does not fit it is about its value.
    Function,
}

/// A file with mutants in it, and where in it which are.
#[derive(Default)]
pub struct Planted {
    pub text: String,
    /// The code of a mutant.
    pub arms: Vec<(Range<usize>, usize)>,
    /// A place with all its mutants.
    pub places: Vec<(Range<usize>, Vec<usize>)>,
}

struct Finder<'a> {
    text: &'a str,
    lines: Vec<usize>,
    /// By genre and start; numbers and replacements.
    wanted: BTreeMap<(String, Place), Vec<(usize, String)>>,
    nodes: Vec<Node>,
    found: BTreeSet<usize>,
    is_const: bool,
}

impl Finder<'_> {
    fn byte(&self, place: LineColumn) -> usize {
        let start = self.lines[place.line - 1];
        let line = &self.text[start..];
        start + line.char_indices().nth(place.column).map_or(line.len(), |(at, _)| at)
    }

    fn range(&self, spanned: &impl Spanned) -> Range<usize> {
        self.byte(spanned.span().start())..self.byte(spanned.span().end())
    }

    fn take(&mut self, genre: &str, at: LineColumn) -> Vec<(usize, String)> {
        let place = Place { line: at.line, column: at.column + 1 };
        if self.is_const {
            return vec![];
        }
        self.wanted.remove(&(genre.into(), place)).unwrap_or_default()
    }

    fn add(&mut self, range: Range<usize>, kind: Kind, arms: Vec<(usize, String)>) {
        if arms.is_empty() {
            return;
        }
        self.found.extend(arms.iter().map(|(number, _)| number));
        match self.nodes.iter_mut().find(|node| node.range == range && node.kind == kind) {
            Some(node) => node.arms.extend(arms),
            None => self.nodes.push(Node { range, kind, arms }),
        }
    }

    fn function(
        &mut self,
        whole: Range<usize>,
        signature: &syn::Signature,
        block: &syn::Block,
        visit: impl FnOnce(&mut Self),
    ) {
        let outer = std::mem::replace(&mut self.is_const, signature.constness.is_some());
        let first = block.stmts.first().map(|statement| statement.span().start());
        let mut arms = first.map_or(vec![], |first| self.take("FnValue", first));
        let result = block.stmts.last().filter(|_| is_some_iterator(&signature.output));
        for (number, replacement) in &mut arms {
            let active = format!("crate::mutant::active() == {number}");
            *replacement = match result {
                // There can be one type: all of its own items or none of them, and then none or the other's.
                Some(_) => format!(
                    ".take(if {active} {{ 0 }} else {{ usize::MAX }}).chain(({replacement}).take(({active}) as usize))"
                ),
                None => format!(" if {active} {{ return {replacement}; }} "),
            };
        }
        let at = result.map_or(self.range(block).start + 1, |result| self.range(result).end);
        self.add(whole, Kind::Function, arms.clone());
        self.add(at..at, Kind::Insert, arms);
        visit(self);
        self.is_const = outer;
    }
}

/// Whether a function returns an iterator of a type without a name.
fn is_some_iterator(output: &syn::ReturnType) -> bool {
    let syn::ReturnType::Type(_, output) = output else { return false };
    let syn::Type::ImplTrait(output) = output.as_ref() else { return false };
    output.bounds.iter().any(|bound| match bound {
        syn::TypeParamBound::Trait(bound) => bound.path.segments.last().is_some_and(|last| last.ident == "Iterator"),
        _ => false,
    })
}

/// Whether a condition binds names: its parts cannot be moved.
fn binds(expression: &syn::Expr) -> bool {
    match expression {
        syn::Expr::Let(_) => true,
        syn::Expr::Binary(binary) => binds(&binary.left) || binds(&binary.right),
        syn::Expr::Paren(inner) => binds(&inner.expr),
        _ => false,
    }
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        let whole = self.range(item);
        self.function(whole, &item.sig, &item.block, |finder| visit::visit_item_fn(finder, item));
    }
    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        let whole = self.range(item);
        self.function(whole, &item.sig, &item.block, |finder| visit::visit_impl_item_fn(finder, item));
    }
    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        let whole = self.range(item);
        match &item.default {
            Some(block) => self.function(whole, &item.sig, block, |finder| visit::visit_trait_item_fn(finder, item)),
            None => visit::visit_trait_item_fn(self, item),
        }
    }

    fn visit_expr_binary(&mut self, binary: &'ast syn::ExprBinary) {
        if !binds(&binary.left) && !binds(&binary.right) {
            let [left, right] = [self.range(&binary.left), self.range(&binary.right)];
            let mut arms = self.take("BinaryOperator", binary.op.span().start());
            for (_, replacement) in &mut arms {
                *replacement = format!("{} {replacement} {}", &self.text[left.clone()], &self.text[right.clone()]);
            }
            self.add(left.start..right.end, Kind::Choice, arms);
        }
        visit::visit_expr_binary(self, binary);
    }

    fn visit_expr_unary(&mut self, unary: &'ast syn::ExprUnary) {
        let (whole, inner) = (self.range(unary), self.range(&unary.expr));
        let mut arms = self.take("UnaryOperator", unary.op.span().start());
        arms.iter_mut().for_each(|(_, replacement)| *replacement = self.text[inner.clone()].into());
        self.add(whole, Kind::Choice, arms);
        visit::visit_expr_unary(self, unary);
    }

    fn visit_expr_struct(&mut self, expression: &'ast syn::ExprStruct) {
        let whole = self.range(expression);
        let fields: Vec<Range<usize>> = expression.fields.iter().map(|field| self.range(field)).collect();
        let mut arms = vec![];
        for (field, range) in expression.fields.iter().zip(&fields) {
            for (number, _) in self.take("StructField", field.span().start()) {
                let mut text = self.text[whole.clone()].to_string();
                let end = range.end + self.text[range.end..].find(',').expect("the rest comes after a comma") + 1;
                text.replace_range(range.start - whole.start..end - whole.start, "");
                arms.push((number, text));
            }
        }
        self.add(whole, Kind::Choice, arms);
        visit::visit_expr_struct(self, expression);
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        let numbers = self.take("MatchArm", arm.span().start());
        let pattern = self.range(&arm.pat);
        if let Some((_, guard)) = &arm.guard {
            let range = self.range(guard.as_ref());
            if !binds(guard) {
                let mut arms = self.take("MatchArmGuard", guard.span().start());
                arms.extend(numbers.into_iter().map(|(number, _)| (number, "false".into())));
                self.add(range, Kind::Choice, arms);
            }
        } else {
            let guards =
                numbers.into_iter().map(|(number, _)| (number, format!(" if crate::mutant::active() != {number} ")));
            self.add(pattern.end..pattern.end, Kind::Insert, guards.collect());
        }
        visit::visit_arm(self, arm);
    }
}

/// Plants those mutants of a file that are not dropped; the second result are those that no rule covers.
pub fn plant(text: &str, mutants: &[(usize, &Mutant)]) -> (Planted, BTreeSet<usize>) {
    let mut wanted = BTreeMap::<_, Vec<_>>::new();
    for (number, mutant) in mutants {
        let key = (mutant.genre.clone(), mutant.span.start);
        wanted.entry(key).or_default().push((*number, mutant.replacement.clone()));
    }
    let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
    let mut finder = Finder { text, lines, wanted, nodes: vec![], found: BTreeSet::new(), is_const: false };
    finder.visit_file(&syn::parse_file(text).expect("Rust"));
    let missing = mutants.iter().map(|(number, _)| *number).filter(|number| !finder.found.contains(number)).collect();
    // Outer ones first, and what is inserted at a place before what begins there.
    finder.nodes.sort_by(|one, other| {
        let key = |node: &Node| (node.range.start, node.kind != Kind::Insert, std::cmp::Reverse(node.range.end));
        key(one).cmp(&key(other))
    });
    let mut planted = Planted::default();
    let mut nodes = finder.nodes.iter().peekable();
    write(text, 0..text.len(), &mut nodes, &mut planted);
    (planted, missing)
}

type Nodes<'a> = std::iter::Peekable<std::slice::Iter<'a, Node>>;

/// Writes a part of the text with everything that is planted within it.
fn write(text: &str, range: Range<usize>, nodes: &mut Nodes<'_>, out: &mut Planted) {
    let mut at = range.start;
    while let Some(node) = nodes.next_if(|node| node.range.start >= range.start && node.range.end <= range.end) {
        out.text.push_str(&text[at..node.range.start]);
        at = node.range.end;
        let start = out.text.len();
        let numbers: Vec<usize> = node.arms.iter().map(|(number, _)| *number).collect();
        match node.kind {
            Kind::Insert => {
                for (number, code) in &node.arms {
                    let start = out.text.len();
                    out.text.push_str(code);
                    out.arms.push((start..out.text.len(), *number));
                }
            }
            Kind::Function => write(text, node.range.clone(), nodes, out),
            Kind::Choice => {
                let others: Vec<String> = numbers.iter().map(|number| format!("mutant_ != {number}")).collect();
                out.text
                    .push_str(&format!("(match crate::mutant::active() {{ mutant_ if {} => (", others.join(" && ")));
                write(text, node.range.clone(), nodes, out);
                out.text.push_str("),");
                for (index, (number, code)) in node.arms.iter().enumerate() {
                    let start = out.text.len();
                    let pattern = if index + 1 == node.arms.len() { "_".into() } else { number.to_string() };
                    out.text.push_str(&format!(" {pattern} => ({code}),"));
                    out.arms.push((start..out.text.len(), *number));
                }
                out.text.push_str(" })");
            }
        }
        out.places.push((start..out.text.len(), numbers));
    }
    out.text.push_str(&text[at..range.end]);
}
