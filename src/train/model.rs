//! A model: modules one after the other, its weights by name, and the adapters on it.

use super::AdapterTable;
use super::seeds::seed_of;
use crate::error::{check_finite, check_shape};
use crate::modules::{Forward, LARGEST, Module, Named, Parameter, Pass, Sequential, Signal};
use crate::peft::AdapterConfig;
use crate::tensor_file::TensorFile;
use crate::wora::Adapter;
use crate::{Error, Result, Scalar};
use ndarray::{ArrayD, ArrayViewMutD};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::SeedableRng;
use std::collections::{BTreeMap, BTreeSet};

/// A model that can be trained, frozen and adapted.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Pass, Signal};
/// use woracle::train::Model;
/// let modules: Vec<woracle::modules::Named> =
///     serde_json::from_str(r#"[{"name": "fc", "type": "linear", "in_features": 2, "out_features": 1}, {"type": "tanh"}]"#)
///         .unwrap();
/// let model = Model::<f64>::new(&modules, 7)?;
/// let names: Vec<String> = model.parameters().into_iter().map(|parameter| parameter.name).collect();
/// assert_eq!(names, ["fc.weight", "fc.bias"]);
/// let (y, _) = model.forward(Signal::Values(array![[1.0, 2.0]].into_dyn()), &Pass::evaluation())?;
/// assert_eq!(y.shape(), [1, 1]);
/// # Ok::<(), woracle::Error>(())
/// ```
pub struct Model<T> {
    modules: Sequential<T>,
}

/// ```
/// use woracle::train::{AdapterTable, Model};
/// # let modules: Vec<woracle::modules::Named> =
/// #     serde_json::from_str(r#"[{"name": "fc", "type": "linear", "in_features": 2, "out_features": 3}]"#).unwrap();
/// let mut model = Model::<f64>::new(&modules, 7)?; // fc: linear from 2 to 3
/// assert_eq!(model.count_trained(), 2 * 3 + 3);
/// let table: AdapterTable =
///     toml::from_str("method = 'wora'\nrank = 1\nlora_alpha = 2.0\ntarget_modules = ['fc']").unwrap();
/// assert_eq!(model.adapt(&table, 7)?, 1); // one layer
/// assert_eq!(model.count_trained(), 2 + 3 + 3 + 1 + 1); // A, B, m, alpha, beta
/// assert_eq!(model.adapters()["fc"].0.rank(), 1);
/// let mut trained = model.trained();
/// assert_eq!(trained.len(), model.parameters_mut().len());
/// trained.values_mut().for_each(|values| values.fill(0.5));
/// model.set_trained(&trained)?;
/// assert_eq!(model.adapters()["fc"].0.alpha.as_ref().unwrap()[[]], 0.5);
/// # Ok::<(), woracle::Error>(())
/// ```
impl<T: Scalar> Model<T> {
    /// A model with fresh weights, all of them trained.
    ///
    /// # Errors
    ///
    /// As [`Sequential::build`].
    pub fn new(modules: &[Named], seed: u64) -> Result<Self> {
        let mut rng = Pcg64::seed_from_u64(seed_of("weights", seed, &[]));
        Ok(Self { modules: Sequential::build(modules, &mut rng)? })
    }

    /// y, and the backward.
    ///
    /// # Errors
    ///
    /// An input that does not fit a module, under the module's name.
    pub fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        self.modules.forward(x, &pass.requiring_grad_x(false))
    }

    /// Every tensor by its name.
    pub fn parameters(&self) -> Vec<Parameter<'_, T>> {
        self.modules.parameters()
    }

    /// Those that are trained, to be changed.
    pub fn parameters_mut(&mut self) -> Vec<(String, ArrayViewMutD<'_, T>)> {
        self.modules.parameters_mut()
    }

    /// The values of everything that is trained, by name and in their shapes.
    pub fn trained(&self) -> BTreeMap<String, ArrayD<T>> {
        let trained = self.parameters().into_iter().filter(|parameter| parameter.trained);
        trained.map(|parameter| (parameter.name, parameter.values.to_owned())).collect()
    }

    /// Gives everything that is trained other values.
    ///
    /// # Errors
    ///
    /// A tensor that is missing (C7) or has another shape (C1).
    pub fn set_trained(&mut self, values: &BTreeMap<String, ArrayD<T>>) -> Result<()> {
        for (name, mut parameter) in self.parameters_mut() {
            let missing = || Error::Missing { tensor: name.clone(), expected: "a tensor".into() };
            let values = values.get(&name).ok_or_else(missing)?; // C7
            check_shape(&name, parameter.shape(), values.shape())?; // C1
            parameter.assign(values);
        }
        Ok(())
    }

    /// Takes every weight from a file of a whole model.
    ///
    /// # Errors
    ///
    /// A tensor that is missing or superfluous (C7), has another shape (C1), or holds a number that is not finite (C2).
    pub fn load(&mut self, file: &TensorFile<'_>) -> Result<()> {
        let mut values = BTreeMap::new();
        for name in file.in_order() {
            let tensor = file.values(&name)?.0.mapv(T::from_f64);
            check_finite(&name, tensor.view())?; // C2
            values.insert(name, tensor);
        }
        let known: BTreeSet<String> = self.parameters().into_iter().map(|parameter| parameter.name).collect();
        if let Some(name) = values.keys().find(|name| !known.contains(*name)) {
            let expected = known.into_iter().collect::<Vec<_>>().join(", ");
            return Err(Error::Unexpected { tensor: name.clone(), reason: format!("expected {expected} alone") }); // C7
        }
        self.set_trained(&values)
    }

    /// Has nothing of it trained any more.
    pub fn freeze(&mut self) {
        self.modules.freeze();
    }

    /// Freezes the model and puts adapters on the layers that the table names; how many.
    ///
    /// # Errors
    ///
    /// As [`Layer::init`](crate::wora::Layer::init), under the layer's name; names that no layer has.
    pub fn adapt(&mut self, table: &AdapterTable, seed: u64) -> Result<usize> {
        let peft = table.to_peft()?;
        self.freeze();
        let mut rng = Pcg64::seed_from_u64(seed_of("adapter", seed, &[]));
        let (mut adapted, mut names, mut parameters) = (Vec::new(), Vec::new(), 0);
        for (name, layer) in self.modules.layers_mut() {
            if peft.targets(&name)? {
                let put = table.of(&peft, &name).and_then(|adapting| layer.adapt(&adapting, &mut rng));
                parameters += put.map_err(|error| Error::Module { module: name.clone(), source: Box::new(error) })?;
                if parameters > LARGEST {
                    let expected = format!("adapters of no more than {LARGEST} parameters in all");
                    return Err(Error::Setting { name: "rank", expected, found: parameters.to_string() }); // C4
                }
                adapted.push(name.clone());
            }
            names.push(name);
        }
        let expected = || format!("some of {}", names.join(", "));
        if adapted.is_empty() {
            let found = peft.fields()["target_modules"].to_string();
            return Err(Error::Setting { name: "target_modules", expected: expected(), found });
        }
        let none = |fits: &dyn Fn(&str) -> bool| !adapted.iter().any(|name| fits(name));
        if let Some(name) = peft.target_modules().iter().find(|target| none(&|name| is_or_ends_in(name, target))) {
            return Err(Error::Setting { name: "target_modules", expected: expected(), found: format!("{name:?}") });
        }
        if let Some((name, pattern)) = peft.patterns().find(|(_, pattern)| none(&|name| pattern.is_match(name))) {
            let expected = format!("a pattern that fits some of {}", adapted.join(", "));
            return Err(Error::Setting { name, expected, found: format!("{:?}", AdapterConfig::written(pattern)) });
        }
        Ok(adapted.len())
    }

    /// The adapters by module, and whether the module is an embedding.
    pub fn adapters(&mut self) -> BTreeMap<String, (Adapter<f64>, bool)> {
        let layers = self.modules.layers_mut().into_iter();
        layers.filter_map(|(name, layer)| Some((name, layer.adapter()?))).collect()
    }

    /// How many numbers are trained.
    pub fn count_trained(&self) -> usize {
        let trained = self.parameters().into_iter().filter(|parameter| parameter.trained);
        trained.map(|parameter| parameter.values.len()).sum()
    }
}

/// Whether a module has this name, or one that ends in it.
fn is_or_ends_in(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

impl AdapterConfig {
    /// The patterns for single modules, and the fields that they stand in.
    fn patterns(&self) -> impl Iterator<Item = (&'static str, &regex::Regex)> {
        let ranks = self.rank_patterns().map(|pattern| ("rank_pattern", pattern));
        ranks.chain(self.alpha_patterns().map(|pattern| ("alpha_pattern", pattern)))
    }

    /// Whether an adapter is put on a module of this name: one of the names or its end, or what the regular expression
    /// fits from end to end.
    ///
    /// # Errors
    ///
    /// What is no regular expression.
    pub fn targets(&self, module: &str) -> Result<bool> {
        if let Some(pattern) = self.target_pattern() {
            let regex = regex::Regex::new(&format!("^(?:{pattern})$")).map_err(|_| {
                let (expected, found) = ("a regular expression".into(), format!("{pattern:?}"));
                Error::Setting { name: "target_modules", expected, found }
            })?;
            return Ok(regex.is_match(module));
        }
        Ok(self.target_modules().iter().any(|name| is_or_ends_in(module, name)))
    }
}
