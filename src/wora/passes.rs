//! Forward, what it keeps, and backward, over any operator, without forming W' or dW'. SPEC.md, section 6.
//!
//! `y = op(x - x~, W0) + g_out (beta op(u, W0) + alpha s B op(u, A)) + b`, `u = g_in x~`.

use super::direction::Direction;
use super::watch::{Watch, unwatched};
use super::{Adapter, Layer, Method, NormAxis, NormGradient, Workspace};
use crate::error::check_shape;
use crate::operators::{
    Contracted, Input, Operator, channel_sums, contract, in_standard_layout, mix_into, scale_and_mix_into, scale_into,
};
use crate::{Error, Result, Scalar};
use ndarray::{
    Array1, Array2, Array3, ArrayD, ArrayView1, ArrayView2, ArrayView3, ArrayViewD, Axis, CowArray, Ix3, IxDyn,
};

/// What [`Layer::forward`] keeps for [`Layer::backward`], which consumes it: a second backward on the same cache does
/// not compile.
///
/// ```compile_fail,E0382
/// # use woracle::{Result, operators::Linear, wora::{Layer, RequiresGrad}};
/// # fn twice(layer: &Layer<Linear, f64>, x: ndarray::ArrayD<f64>, dy: ndarray::ArrayD<f64>) -> Result<()> {
/// let (_, cache) = layer.forward(x.view().into(), None)?;
/// layer.backward(cache, dy.view(), RequiresGrad::ALL)?;
/// layer.backward(cache, dy.view(), RequiresGrad::ALL)?; // the value was moved
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Cache<'x, O: Operator, T: Scalar> {
    /// x, as it was given.
    pub(super) x: O::Input<'x, T>,
    /// The mask, in the shape of x, and `x~ = mask x`.
    pub(super) dropped: Option<(ArrayD<T>, O::Input<'x, T>)>,
    /// `u = g_in x~`, where the gain acts on input columns.
    gained: Option<O::Input<'x, T>>,
    /// `P = op(u, W0)`: `[outer, units, inner]`
    pub(super) base_output: Array3<T>,
    /// `U = op(u, A)`: `[outer, rank, inner]`
    pub(super) lora_output: Array3<T>,
    /// Norms and gains; `None` for LoRA.
    pub(super) direction: Option<Direction<T>>,
    /// The shape of y.
    output_shape: Vec<usize>,
}

/// Which gradients beside the adapter's are wanted. PyTorch's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequiresGrad {
    /// The input's. On by default.
    pub x: bool,
    /// The base weight's, which is frozen: one more large product. Off by default.
    pub weight: bool,
    /// The bias's. Off by default.
    pub bias: bool,
}

impl Default for RequiresGrad {
    fn default() -> Self {
        Self { x: true, weight: false, bias: false }
    }
}

impl RequiresGrad {
    /// All of them.
    pub const ALL: Self = Self { x: true, weight: true, bias: true };
}

/// The gradients of one backward, each in the shape of what it is the gradient of.
///
/// ```
/// # use ndarray::array;
/// # use rand::SeedableRng;
/// # use woracle::{operators::Linear, wora::{Base, Config, Layer, LoraInit, Method}};
/// use woracle::wora::RequiresGrad;
/// # let operator = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
/// # let bias = Some(array![0.5, 0.5].into_dyn());
/// # let base = Base { weight: array![[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]].into_dyn().into(), bias };
/// # let mut rng = rand_pcg::Pcg64::seed_from_u64(1);
/// # let layer = Layer::init(operator, Config::new(Method::Wora, 2.0), base, 1, LoraInit::default(), &mut rng)?;
/// let (x, dy) = (array![[1.0, 1.0, 1.0]].into_dyn(), array![[1.0, -1.0]].into_dyn());
/// let (_, cache) = layer.forward(x.view().into(), None)?;
/// let wanted = RequiresGrad { bias: true, ..RequiresGrad::default() };
/// let gradients = layer.backward(cache, dy.view(), wanted)?;
/// assert_eq!(gradients.x.unwrap(), array![[1.0, -1.0, -2.0]].into_dyn()); // dy W', which is still W0
/// assert_eq!(gradients.bias.unwrap(), array![1.0, -1.0].into_dyn()); // the sum of dy over rows
/// assert!(gradients.weight.is_none()); // W0 is frozen: nobody asked
/// assert_eq!(gradients.adapter.lora_a, array![[0.0, 0.0, 0.0]].into_dyn()); // comes through B, which is zero
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<E> {
    /// dx; `None` for ids, or where not wanted.
    pub x: Option<ArrayD<E>>,
    /// dW0, where wanted.
    pub weight: Option<ArrayD<E>>,
    /// db, where wanted and there is a bias.
    pub bias: Option<ArrayD<E>>,
    /// dA, dB, dm, dalpha, dbeta.
    pub adapter: Adapter<E>,
}

impl<'x, O: Operator, T: Scalar> Cache<'x, O, T> {
    /// Norms and gains; `None` for LoRA.
    pub(crate) fn direction(&self) -> Option<&Direction<T>> {
        self.direction.as_ref()
    }
    /// `x~`: what meets the adapted weight.
    pub(super) fn adapted_input(&self) -> &O::Input<'x, T> {
        self.dropped.as_ref().map_or(&self.x, |(_, masked)| masked)
    }
    /// u: what the operator was applied to.
    fn u(&self) -> &O::Input<'x, T> {
        self.gained.as_ref().unwrap_or_else(|| self.adapted_input())
    }
}

impl<O: Operator, T: Scalar> Layer<O, T> {
    /// y, and what backward needs; E17 without a mask or with one. x and y: linear `[..., in]` and `[..., out]`;
    /// embedding ids `[...]` and `[..., embedding_dim]`; convolution `[batch, in, size...]` and `[batch, out,
    /// size...]`, `batch` in both or in neither. The mask, in the shape of x, holds 0 where the correction is dropped
    /// and `1 / (1 - p)` elsewhere; ids take none.
    ///
    #[doc = include_str!("../../docs/layer_forward.md")]
    ///
    /// # Errors
    ///
    /// An input or a mask that does not fit (C1), ids that the embedding does not have (C9), a convolution without any
    /// output (C10); a unit with `||V|| = 0` (C5), unless `zero_norm` allows it; a norm that overflows (C2). Values of
    /// x are not looked at: a NaN there is a NaN in y.
    pub fn forward<'x>(
        &self,
        x: O::Input<'x, T>,
        mask: Option<ArrayViewD<'_, T>>,
    ) -> Result<(ArrayD<T>, Cache<'x, O, T>)> {
        self.forward_in(&Workspace::default(), x, mask)
    }

    /// [`Layer::forward`] in memory that an earlier step has left.
    ///
    /// # Errors
    ///
    /// As [`Layer::forward`].
    pub fn forward_in<'x>(
        &self,
        workspace: &Workspace<T>,
        x: O::Input<'x, T>,
        mask: Option<ArrayViewD<'_, T>>,
    ) -> Result<(ArrayD<T>, Cache<'x, O, T>)> {
        self.forward_watched(workspace, x, mask, &mut unwatched)
    }

    /// [`Layer::forward_in`], every line of which is shown to `watch`.
    ///
    /// # Errors
    ///
    /// As [`Layer::forward`].
    pub(crate) fn forward_watched<'x>(
        &self,
        workspace: &Workspace<T>,
        x: O::Input<'x, T>,
        mask: Option<ArrayViewD<'_, T>>,
        watch: &mut Watch<'_, T>,
    ) -> Result<(ArrayD<T>, Cache<'x, O, T>)> {
        let direction = self.direction()?;
        if let Some(direction) = &direction {
            direction.show(&self.factors(), watch);
        }
        let gain = direction.as_ref().map(|direction| direction.gain.view());
        let (y, mut cache) = self.forward_with_gain(workspace, x, mask, gain, watch)?;
        cache.direction = direction;
        Ok((y, cache))
    }

    /// y with the norms held at `weight_norm` instead of `||V||`: the function whose gradient the detached
    /// backward is. `weight_norm`: `[units]` or `[fan_in]`; 0 stands for a unit without a direction.
    ///
    /// # Errors
    ///
    /// As [`Layer::forward`].
    ///
    /// ```
    /// # use ndarray::array;
    /// # use rand::SeedableRng;
    /// # use woracle::{operators::Linear, wora::{Base, Config, Layer, LoraInit, Method}};
    /// # let operator = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
    /// # let base = Base { weight: array![[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]].into_dyn().into(), bias: None };
    /// # let mut rng = rand_pcg::Pcg64::seed_from_u64(1);
    /// # let layer = Layer::init(operator, Config::new(Method::Wora, 2.0), base, 1, LoraInit::default(), &mut rng)?;
    /// let x = array![[1.0, 1.0, 1.0]].into_dyn();
    /// let (y, _) = layer.forward(x.view().into(), None)?; // norms 3 and 5
    /// let held = layer.forward_at_norm(x.view().into(), None, array![3.0, 5.0].view())?;
    /// let twice = layer.forward_at_norm(x.view().into(), None, array![6.0, 5.0].view())?;
    /// assert_eq!(held, y);
    /// assert_eq!(twice, array![[2.5, 7.0]].into_dyn()); // the first unit's gain is half
    /// # Ok::<(), woracle::Error>(())
    /// ```
    pub fn forward_at_norm(
        &self,
        x: O::Input<'_, T>,
        mask: Option<ArrayViewD<'_, T>>,
        weight_norm: ArrayView1<'_, T>,
    ) -> Result<ArrayD<T>> {
        check_shape("weight_norm", self.base_sq.shape(), weight_norm.shape())?; // C1
        let gain = self.magnitude().map(|magnitude| Direction::gain(magnitude, weight_norm));
        let gain = gain.as_ref().map(|gain| gain.view());
        Ok(self.forward_with_gain(&Workspace::default(), x, mask, gain, &mut unwatched)?.0)
    }

    /// The gains of input columns and of output units: at most one of them is not 1.
    pub(super) fn split_gain<'g>(
        &self,
        gain: Option<ArrayView1<'g, T>>,
    ) -> (Option<ArrayView1<'g, T>>, Option<ArrayView1<'g, T>>) {
        match self.config.norm_axis {
            NormAxis::Input => (gain, None),
            NormAxis::Output => (None, gain),
        }
    }

    fn forward_with_gain<'x>(
        &self,
        workspace: &Workspace<T>,
        x: O::Input<'x, T>,
        mask: Option<ArrayViewD<'_, T>>,
        gain: Option<ArrayView1<'_, T>>,
        watch: &mut Watch<'_, T>,
    ) -> Result<(ArrayD<T>, Cache<'x, O, T>)> {
        let output_shape = self.operator.output_shape(&x)?;
        let dropped = mask.map(|mask| masked::<O, T>(&x, mask)).transpose()?;
        let (gain_in, gain_out) = self.split_gain(gain);
        let (beta, gamma) = (self.beta(), self.alpha() * self.scaling());

        let met = dropped.as_ref().map_or(&x, |(_, masked)| masked);
        let gained = gain_in.map(|gain| {
            let scaled = &met.values().expect("features") * &gain; // E15
            O::Input::from_values(scaled).expect("features")
        });
        if let Some(u) = gained.as_ref().unwrap_or(met).values() {
            watch("E15", "u", &|| u.to_owned());
        }
        let [outer, inner] = self.operator.places(&x);
        let output = |weight: ArrayView2<'_, T>| workspace.array(Ix3(outer, weight.nrows(), inner));
        let (mut base_output, mut lora_output) = (output(self.weight()), output(self.a()));
        let outputs = vec![base_output.view_mut(), lora_output.view_mut()];
        self.operator.apply_into(gained.as_ref().unwrap_or(met), &[self.weight(), self.a()], outputs); // E16
        watch("E16", "P", &|| base_output.clone().into_dyn());
        watch("E16", "U", &|| lora_output.clone().into_dyn());
        watch("E5", "Z", &|| {
            let mut mixed = Array3::zeros(base_output.dim());
            mix_into(mixed.view_mut(), self.b(), lora_output.view(), self.operator.groups());
            mixed.into_dyn()
        });

        let gain_out = gain_out.map_or_else(|| Array1::ones(self.operator.units()), |gain| gain.to_owned());
        let bias = self.base.bias.as_ref().map(|bias| bias.view().into_dimensionality().expect("[units]"));
        let scale = &gain_out * beta;
        let b = &self.b() * &(&gain_out * gamma).insert_axis(Axis(1));
        let groups = self.operator.groups();
        let (mut y, u) = (output(self.weight()), lora_output.view());
        scale_and_mix_into(y.view_mut(), base_output.view(), scale.view(), bias, b.view(), u, groups); // E17
        if let Some((_, masked)) = &dropped {
            let kept = O::Input::from_values(&x.values().expect("values") - &masked.values().expect("values"));
            y += &self.operator.apply(&kept.expect("values"), &[self.weight()])[0]; // E17
        }
        let y = y.into_shape_with_order(output_shape.clone()).expect("as many outputs as the shape says");
        watch("E17", "y", &|| y.clone());
        Ok((y, Cache { x, dropped, gained, base_output, lora_output, direction: None, output_shape }))
    }

    /// The gradients of `<dy, y>`: exact with `norm_gradient = "full"`, with `||V||` held constant with
    /// `"detached"`. dy has the shape of y.
    ///
    #[doc = include_str!("../../docs/layer_backward.md")]
    ///
    /// # Errors
    ///
    /// A dy of another shape than y (C1); with the full norm gradient, a norm whose square leaves the range of
    /// the type (C11).
    pub fn backward(
        &self,
        cache: Cache<'_, O, T>,
        dy: ArrayViewD<'_, T>,
        requires_grad: RequiresGrad,
    ) -> Result<Gradients<T>> {
        self.backward_in(&Workspace::default(), cache, dy, requires_grad)
    }

    /// [`Layer::backward`] in memory that an earlier step has left.
    ///
    /// # Errors
    ///
    /// As [`Layer::backward`].
    pub fn backward_in(
        &self,
        workspace: &Workspace<T>,
        cache: Cache<'_, O, T>,
        dy: ArrayViewD<'_, T>,
        requires_grad: RequiresGrad,
    ) -> Result<Gradients<T>> {
        Ok(self.backward_and_input(workspace, cache, dy, requires_grad)?.0)
    }

    /// [`Layer::backward_in`], and x for whoever has a use for its memory.
    pub(crate) fn backward_and_input<'x>(
        &self,
        workspace: &Workspace<T>,
        mut cache: Cache<'x, O, T>,
        dy: ArrayViewD<'_, T>,
        requires_grad: RequiresGrad,
    ) -> Result<(Gradients<T>, O::Input<'x, T>)> {
        let lora_output = std::mem::replace(&mut cache.lora_output, Array3::zeros((0, 0, 0)));
        let gradients = self.gradients(workspace, &cache, lora_output, dy, requires_grad, &mut unwatched);
        workspace.recycle(cache.base_output);
        Ok((gradients?, cache.x))
    }

    /// [`Layer::backward`] of a cache that is looked at once more afterwards.
    pub(crate) fn backward_of(
        &self,
        cache: &Cache<'_, O, T>,
        dy: ArrayViewD<'_, T>,
        requires_grad: RequiresGrad,
    ) -> Result<Gradients<T>> {
        self.backward_watched(cache, dy, requires_grad, &mut unwatched)
    }

    /// [`Layer::backward_of`], every line of which is shown to `watch`.
    ///
    /// # Errors
    ///
    /// As [`Layer::backward`].
    pub(crate) fn backward_watched(
        &self,
        cache: &Cache<'_, O, T>,
        dy: ArrayViewD<'_, T>,
        requires_grad: RequiresGrad,
        watch: &mut Watch<'_, T>,
    ) -> Result<Gradients<T>> {
        self.gradients(&Workspace::default(), cache, cache.lora_output.clone(), dy, requires_grad, watch)
    }

    /// [`Layer::backward`], but for the cache's U, which is handed over.
    fn gradients(
        &self,
        workspace: &Workspace<T>,
        cache: &Cache<'_, O, T>,
        lora_output: Array3<T>,
        dy: ArrayViewD<'_, T>,
        requires_grad: RequiresGrad,
        watch: &mut Watch<'_, T>,
    ) -> Result<Gradients<T>> {
        check_shape("grad.y", &cache.output_shape, dy.shape())?; // C1
        let groups = self.operator.groups();
        let (beta, gamma, scaling) = (self.beta(), self.alpha() * self.scaling(), self.scaling());
        let dy: CowArray<'_, T, Ix3> = dy.to_shape(cache.base_output.dim()).expect("as many as y");
        let gain = cache.direction.as_ref().map(|direction| direction.gain.view());
        let (gain_in, gain_out) = self.split_gain(gain);
        let gain_out = gain_out.map_or_else(|| Array1::ones(self.operator.units()), |gain| gain.to_owned());

        let gain_gamma = (&gain_out * gamma).insert_axis(Axis(1));
        let b = &self.b() * &gain_gamma;
        let Contracted { products: p, weight: s, input: t } =
            contract(dy.view(), cache.base_output.view(), lora_output, b.view(), groups); // E19, E23
        let z = (&self.b() * &s).sum_axis(Axis(1)); // E19
        let mut dbeta = gain_out.dot(&p); // E20
        let mut dalpha = scaling * gain_out.dot(&z); // E21
        let mut db = &s * &gain_gamma; // E22
        let mut da = self.operator.adjoint_weight(cache.u(), t.view()); // E24
        watch("E18", "H", &|| (&dy * &gain_out.view().insert_axis(Axis(1))).into_dyn());
        watch("E19", "p", &|| p.clone().into_dyn());
        watch("E19", "S", &|| s.clone().into_dyn());
        watch("E19", "z", &|| z.clone().into_dyn());
        if self.config.method == Method::Wora {
            watch("E20", "dbeta", &|| ArrayD::from_elem(IxDyn(&[]), dbeta));
            watch("E21", "dalpha", &|| ArrayD::from_elem(IxDyn(&[]), dalpha));
        }
        watch("E22", "dB", &|| db.clone().into_dyn());
        watch("E23", "T", &|| t.clone().into_dyn());
        watch("E24", "dA", &|| da.clone().into_dyn());
        let scale = &gain_out * beta;
        let h_beta = || {
            let mut h_beta = workspace.array(dy.raw_dim());
            scale_into(h_beta.view_mut(), dy.view(), scale.view()); // E18
            h_beta
        };

        let du = (requires_grad.x || gain_in.is_some()).then(|| cache.x.values()).flatten().map(|_| {
            let mut du = workspace.array(IxDyn(cache.x.shape()));
            let of_pair = (t.view(), self.a());
            // The gain is put on whichever is smaller.
            if dy.len() <= self.base.weight.len() {
                let h_beta = h_beta();
                let pairs = [(h_beta.view(), self.weight()), of_pair];
                self.operator.adjoint_input_into(cache.u(), &pairs, du.view_mut()); // E25
                workspace.recycle(h_beta);
            } else {
                let gained = &self.weight() * &scale.view().insert_axis(Axis(1));
                let pairs = [(dy.view(), gained.view()), of_pair];
                self.operator.adjoint_input_into(cache.u(), &pairs, du.view_mut()); // E25
            }
            du
        });
        workspace.recycle(t);
        if let Some(du) = &du {
            watch("E25", "du", &|| du.clone());
        }
        let mut weight = requires_grad.weight.then(|| self.adjoint_weight(cache, dy.view(), h_beta().view()));
        if let Some(weight) = &weight {
            watch("E29", "dW0", &|| weight.clone().into_dyn());
        }

        let mut magnitude = None;
        if let Some(direction) = &cache.direction {
            let dgain = match self.config.norm_axis {
                NormAxis::Output => &p * beta + &z * gamma, // E27
                NormAxis::Input => column_sums(feature_products(cache, du.as_ref().expect("features").view())), // E27
            };
            magnitude = Some(direction.dmagnitude(dgain.view())); // E28
            watch("E27", "c", &|| dgain.clone().into_dyn());
            watch("E28", "dm", &|| direction.dmagnitude(dgain.view()).into_dyn());
            if self.config.norm_gradient == NormGradient::Full {
                let (k, factors) = (direction.norm_weight(dgain.view()), self.factors());
                direction.check_squares(&factors)?; // C11
                let path = direction.adjoint(k.view(), &factors);
                watch("E31", "k", &|| k.clone().into_dyn());
                dalpha += path.dalpha; // E32
                dbeta += path.dbeta; // E33
                if self.config.method == Method::Wora {
                    watch("E32", "dalpha", &|| ArrayD::from_elem(IxDyn(&[]), dalpha));
                    watch("E33", "dbeta", &|| ArrayD::from_elem(IxDyn(&[]), dbeta));
                }
                let (path_b, path_a) = match self.config.norm_axis {
                    NormAxis::Output => (path.d_left, path.d_right),
                    NormAxis::Input => (path.d_right.reversed_axes(), path.d_left.reversed_axes()),
                };
                db += &path_b; // E34
                da += &path_a; // E35
                watch("E34", "dB", &|| db.clone().into_dyn());
                watch("E35", "dA", &|| da.clone().into_dyn());
                if let Some(weight) = &mut weight {
                    let rows = match self.config.norm_axis {
                        NormAxis::Output => weight.view_mut(),
                        NormAxis::Input => weight.view_mut().reversed_axes(),
                    };
                    direction.adjoint_base(k.view(), &factors, rows); // E36
                    watch("E36", "dW0", &|| weight.clone().into_dyn());
                }
            }
        }

        let x = du.filter(|_| requires_grad.x).map(|du| self.adjoint_x(cache, dy.view(), du, gain_in));
        if let Some(dx) = &x {
            watch("E26", "dx", &|| dx.clone());
        }
        let bias = self.base.bias.as_ref().filter(|_| requires_grad.bias).map(|_| channel_sums(dy.view()).into_dyn()); // E30
        if let Some(db) = &bias {
            watch("E30", "db", &|| db.clone());
        }
        let stored = |tensor: &ArrayD<T>, gradient: Array2<T>| {
            in_standard_layout(gradient).into_shape_with_order(tensor.shape()).expect("as many as the tensor has")
        };
        let magnitude = magnitude.zip(self.adapter.magnitude.as_ref());
        let scalar = |value| (self.config.method == Method::Wora).then(|| ArrayD::from_elem(IxDyn(&[]), value));
        Ok(Gradients {
            x,
            weight: weight.map(|weight| self.operator.stored_weight(weight)),
            bias,
            adapter: Adapter {
                lora_a: stored(&self.adapter.lora_a, da),
                lora_b: stored(&self.adapter.lora_b, db),
                magnitude: magnitude.map(|(dm, m)| dm.into_shape_with_order(m.shape()).expect("one an entry of m")),
                alpha: scalar(dalpha),
                beta: scalar(dbeta),
            },
        })
    }

    /// `dx~ = g_in du`; with a mask, `dx = mask dx~ + (1 - mask) op*(dy, W0)`. E26
    fn adjoint_x(
        &self,
        cache: &Cache<'_, O, T>,
        dy: ArrayView3<'_, T>,
        mut du: ArrayD<T>,
        gain_in: Option<ArrayView1<'_, T>>,
    ) -> ArrayD<T> {
        if let Some(gain) = gain_in {
            du *= &gain; // E26
        }
        if let Some((mask, _)) = &cache.dropped {
            let kept = self.operator.adjoint_input(&cache.x, &[(dy, self.weight())]).expect("values");
            ndarray::azip!((dx in &mut du, &kept in &kept, &mask in mask) *dx = mask * *dx + (T::one() - mask) * kept); // E26
        }
        du
    }

    /// dW0 with the norm held fixed: `[units, fan_in]`. E29
    fn adjoint_weight(&self, cache: &Cache<'_, O, T>, dy: ArrayView3<'_, T>, h_beta: ArrayView3<'_, T>) -> Array2<T> {
        let mut weight = self.operator.adjoint_weight(cache.u(), h_beta); // E29
        if let Some((_, masked)) = &cache.dropped {
            weight += &self.operator.adjoint_weight(&cache.x, dy); // E29
            weight -= &self.operator.adjoint_weight(masked, dy); // E29
        }
        weight
    }
}

/// Fails unless an input takes a mask of this shape. C1
pub(crate) fn check_mask<T>(x: &impl Input<T>, mask: &[usize]) -> Result<()> {
    if x.values().is_none() {
        let reason = "expected none: PEFT applies no dropout to ids".into();
        return Err(Error::Unexpected { tensor: "dropout_mask".into(), reason }); // C1
    }
    check_shape("dropout_mask", x.shape(), mask) // C1
}

/// The mask, and the input under it.
fn masked<'x, O: Operator, T: Scalar>(
    x: &O::Input<'x, T>,
    mask: ArrayViewD<'_, T>,
) -> Result<(ArrayD<T>, O::Input<'x, T>)> {
    check_mask(x, mask.shape())?;
    let values = x.values().expect("values");
    let masked = O::Input::from_values(&values * &mask).expect("values");
    Ok((mask.to_owned(), masked))
}

/// `x~ du`, in the shape of x, whose sums over rows are the gradients of the columns' gains.
pub(super) fn feature_products<O: Operator, T: Scalar>(cache: &Cache<'_, O, T>, du: ArrayViewD<'_, T>) -> ArrayD<T> {
    &cache.adapted_input().values().expect("features") * &du
}

/// Sums over rows, for every column: `[fan_in]`.
pub(super) fn column_sums<T: Scalar>(values: ArrayD<T>) -> Array1<T> {
    let columns = values.shape().last().copied().unwrap_or(1);
    let rows = values.len() / columns;
    values.into_shape_with_order((rows, columns)).expect("standard layout").sum_axis(Axis(0))
}
