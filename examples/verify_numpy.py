"""WoRA's case files answered in plain NumPy, from SPEC.md alone.

    python verify_numpy.py CASES_DIR ANSWERS_DIR

For every case of a linear, embedding or conv2d layer in CASES_DIR a file of the same name is written to
ANSWERS_DIR: the inputs, the answers of section 11 and the same metadata. All is computed in float64 by the definition
(section 4) and its backward (section 4.2), over weights as matrices [units, fan_in]. Labels (E9 ...) are SPEC.md's.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

DEFAULTS = {  # the table of section 11
    "method": "wora", "norm_gradient": "detached", "norm_axis": "output", "norm_eps": 0.0, "zero_norm": "error",
    "fan_in_fan_out": False, "padding_idx": None, "scale_grad_by_freq": False, "embed_scale": None, "max_norm": None,
    "stride": 1, "dilation": 1, "padding": 0, "groups": 1, "padding_mode": "zeros",
}


# --------------------------------------------------------------------------------------------------------------------
# Operators (section 3). Each turns an input into *columns* [outer, groups, fan_in, inner], linearly, so that the same
# three products serve all layers: Y = W columns, dW = dY columns^T, dcolumns = W^T dY (E2-E4, E46-E48).
# dY is [outer, units, inner]; groups are blocks of consecutive units and of consecutive channels.


class Linear:
    """E2-E4. outer runs over rows, inner is 1."""

    groups = 1
    fraction = 1.0  # f of E41: what a lookup's A and W0 learn; 1 for every other layer

    def __init__(self, case, tensors):
        self.input_shape = tensors["x"].shape
        self.before_units, self.after_units = self.input_shape[:-1], ()  # the axes of y around the units
        self.transposed = case["fan_in_fan_out"]  # base.weight is stored [in, out]

    def matrix(self, stored):
        return stored.T if self.transposed else stored

    def stored(self, matrix):
        return matrix.T if self.transposed else matrix

    def columns(self, x):
        return x.reshape(-1, 1, self.input_shape[-1], 1)

    def columns_adjoint(self, dcolumns):
        return dcolumns.reshape(self.input_shape)

    def forward(self, columns, weight):
        y = np.einsum("guc,ogcp->ogup", self.by_group(weight), columns)
        return y.reshape(len(columns), len(weight), -1)

    def adjoint_x(self, dy, weight):
        dy = dy.reshape(len(dy), self.groups, -1, dy.shape[-1])
        return self.columns_adjoint(np.einsum("guc,ogup->ogcp", self.by_group(weight), dy))

    def adjoint_w(self, columns, dy):
        units = dy.shape[1]
        dy = dy.reshape(len(dy), self.groups, -1, dy.shape[-1])
        return np.einsum("ogup,ogcp->guc", dy, columns).reshape(units, -1)

    def by_group(self, matrix):
        return matrix.reshape(self.groups, -1, matrix.shape[1])


class Embedding(Linear):
    """E39-E41. A lookup is a product with one-hot columns times embed_scale; the matrix's columns are the ids."""

    def __init__(self, case, tensors):
        ids, self.vocabulary = tensors["x"], len(tensors["base.weight"])
        if case["max_norm"] is not None:
            raise ValueError("max_norm is refused (section 3.3)")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise ValueError("an id is out of range (C9)")
        self.before_units, self.after_units = ids.shape, ()
        self.transposed = True  # the table is stored [num_embeddings, embedding_dim]
        self.scale = 1.0 if case["embed_scale"] is None else case["embed_scale"]
        counts = np.bincount(ids.reshape(-1).astype(np.int64), minlength=self.vocabulary)
        self.fraction = 1.0 / np.maximum(counts, 1) if case["scale_grad_by_freq"] else np.ones(self.vocabulary)
        if case["padding_idx"] is not None:
            self.fraction[case["padding_idx"]] = 0.0

    def columns(self, ids):
        one_hot = ids.reshape(-1, 1) == np.arange(self.vocabulary)
        return self.scale * one_hot[:, None, :, None]


class Conv2d(Linear):
    """E42-E48. inner runs over output positions, a unit's row over channels, then kernel positions."""

    def __init__(self, case, tensors):
        self.weight_shape, self.input_shape = tensors["base.weight"].shape, tensors["x"].shape
        self.groups = case["groups"]
        settings = [case[name] if isinstance(case[name], list) else [case[name]] * 2
                    for name in ("stride", "dilation", "padding")]
        rows, cols = (read_positions(*axis, case["padding_mode"])
                      for axis in zip(self.input_shape[-2:], self.weight_shape[2:], *settings))
        self.before_units = self.input_shape[:-3]  # empty where x has no batch axis
        self.after_units = (len(rows), len(cols))
        # Indexes [P_rows, P_cols, K_rows, K_cols] into an image that has got one more row and one more column of
        # zeros at its end, which is where -1 reads.
        self.reads = (..., rows[:, None, :, None], cols[None, :, None, :])

    def matrix(self, stored):
        return stored.reshape(len(stored), -1)

    def stored(self, matrix):
        return matrix.reshape(self.weight_shape)

    def columns(self, x):
        """unfold (E44)"""
        x = np.pad(x.reshape(-1, *self.input_shape[-3:]), [(0, 0), (0, 0), (0, 1), (0, 1)])
        windows = x[self.reads].transpose(0, 1, 4, 5, 2, 3)  # [image, channel, K_rows, K_cols, P_rows, P_cols]
        return windows.reshape(len(x), self.groups, -1, np.prod(self.after_units))

    def columns_adjoint(self, dcolumns):
        """fold (E45)"""
        channels, height, width = self.input_shape[-3:]
        windows = dcolumns.reshape(-1, channels, *self.weight_shape[2:], *self.after_units)
        dx = np.zeros((len(windows), channels, height + 1, width + 1))
        np.add.at(dx, self.reads, windows.transpose(0, 1, 4, 5, 2, 3))
        return dx[..., :-1, :-1].reshape(self.input_shape)


def read_positions(size, kernel, stride, dilation, padding, mode):
    """sigma(p, k) of E43 for one axis, as [P, K]; -1 where nothing is read."""
    if padding == "same":
        before, both = dilation * (kernel - 1) // 2, dilation * (kernel - 1)
    else:
        before = 0 if padding == "valid" else padding
        both = 2 * before
    count = (size + both - dilation * (kernel - 1) - 1) // stride + 1  # E42
    t = np.arange(count)[:, None] * stride + np.arange(kernel) * dilation - before
    if mode == "reflect":
        t = np.abs(t)
        return np.where(t >= size, 2 * (size - 1) - t, t)
    if mode == "replicate":
        return np.clip(t, 0, size - 1)
    if mode == "circular":
        return t % size
    return np.where((t >= 0) & (t < size), t, -1)


OPERATORS = {"linear": Linear, "embedding": Embedding, "conv2d": Conv2d}


# --------------------------------------------------------------------------------------------------------------------
# The layer (section 4)


def norms(v, axis):
    """Norms along an axis, scaled by the largest element so that no square overflows or vanishes (section 5.2)."""
    largest = np.abs(v).max(axis=axis, keepdims=True)
    largest = np.where(largest > 0, largest, 1.0)
    return largest * np.sqrt(np.sum((v / largest) ** 2, axis=axis, keepdims=True))


def divide(a, b):
    """a / b, and 0 where b is 0: a unit without a direction has no gain and zero gradients (C5)"""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


def forward(case, given, operator):
    """E9-E13, and what the backward needs of them. `given` holds the inputs in float64 (ids as they are)."""
    w0 = operator.matrix(given["base.weight"])
    a = given["A"].reshape(operator.groups, -1, w0.shape[1])  # unit i of group q mixes the ranks of group q only
    b = given["B"].reshape(operator.groups, len(w0) // operator.groups, -1)
    ba = (b @ a).reshape(w0.shape)
    alpha, beta = float(given.get("lora_wora_alpha", 1.0)), float(given.get("lora_wora_beta", 1.0))
    v = beta * w0 + alpha * case["scaling"] * ba  # E9

    length = n = None  # LoRA has no norm; its gain is 1
    gain = np.ones((len(w0), 1))
    norm_over = 1 if case["norm_axis"] == "output" else 0  # the axis of V that a norm runs along
    if case["method"] != "lora":
        length = norms(v, norm_over)
        if case["zero_norm"] == "error" and not length.all():
            raise ValueError("a row of V is 0 (C5)")
        n = np.where(length > 0, length + case["norm_eps"], 0.0)  # E10, C5
        gain = divide(given["lora_magnitude_vector"].reshape(n.shape), n)  # E11
    merged = gain * v  # E12

    x, mask, dropped = given["x"], given.get("dropout_mask"), None
    kept = operator.columns(x if mask is None else mask * x)
    y = operator.forward(kept, merged)  # E13, in the form of E17
    if mask is not None:
        dropped = operator.columns(x - mask * x)
        y = y + operator.forward(dropped, w0)
    if "base.bias" in given:
        y = y + given["base.bias"][:, None]
    return SimpleNamespace(**locals())


def backward(case, given, operator, f):
    """Section 4.2: the gradients of all inputs, from what `forward` has left in f."""
    dy = given["grad.y"].reshape(f.y.shape)
    dmerged = operator.adjoint_w(f.kept, dy)  # E142
    dv = f.gain * dmerged  # E145
    dv_lookup = dv * operator.fraction  # what reaches A and W0 (E41)
    grads = {}
    if f.n is not None:
        c = np.sum(dmerged * f.v, axis=f.norm_over, keepdims=True)  # E144
        grads["lora_magnitude_vector"] = divide(c, f.n)  # E28
        if case["norm_gradient"] == "full":
            through_norm = -divide(c, f.n) * divide(f.gain, f.length) * f.v  # E31, E145
            dv, dv_lookup = dv + through_norm, dv_lookup + through_norm
    grads["lora_wora_alpha"] = case["scaling"] * np.sum(dv * f.ba)  # E146
    grads["lora_wora_beta"] = np.sum(dv * f.w0)  # E147
    factor = f.alpha * case["scaling"]
    grads["B"] = factor * operator.by_group(dv) @ f.a.transpose(0, 2, 1)  # E148
    grads["A"] = factor * f.b.transpose(0, 2, 1) @ operator.by_group(dv_lookup)  # E149
    dw0 = f.beta * dv_lookup  # E150
    if f.mask is not None:
        dw0 = dw0 + operator.adjoint_w(f.dropped, dy)  # E150
    grads["base.weight"] = operator.stored(dw0)
    grads["base.bias"] = dy.sum(axis=(0, 2))  # E30
    if case["layer"] != "embedding":  # ids have no gradient
        grads["x"] = operator.adjoint_x(dy, f.merged)  # E143
        if f.mask is not None:
            grads["x"] = f.mask * grads["x"] + (1 - f.mask) * operator.adjoint_x(dy, f.w0)  # E143
    return {name: grad.reshape(given[name].shape) for name, grad in grads.items() if name in given}


def answer(case, tensors):
    """Every answer of section 11 for one case, as name -> array."""
    prefix = "lora_embedding_" if case["layer"] == "embedding" else "lora_"
    short = {prefix + "A": "A", prefix + "B": "B"}
    given = {short.get(name, name): tensor.astype(np.float64) if tensor.dtype.kind == "f" else tensor
             for name, tensor in tensors.items()}
    operator = OPERATORS[case["layer"]](case, tensors)
    f = forward(case, given, operator)
    y_shape = (*operator.before_units, len(f.w0), *operator.after_units)
    answers = {"y": f.y.reshape(y_shape), "merged_weight": operator.stored(f.merged)}
    if f.n is not None:
        answers |= {"weighted": operator.stored(f.v), "weight_norm": f.n.reshape(-1), "gain": f.gain.reshape(-1)}
    if "grad.y" in given:
        long = {v: k for k, v in short.items()}
        grads = backward(case, given, operator, f)
        answers |= {"grad." + long.get(name, name): grad for name, grad in grads.items()}
    return answers


# --------------------------------------------------------------------------------------------------------------------
# Files (section 11)


def main(cases, answers):
    Path(answers).mkdir(parents=True, exist_ok=True)
    written = 0
    for path in sorted(Path(cases).glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            text = file.metadata()["wora_case"]
            case = DEFAULTS | json.loads(text)
            if case["format"] != 1:
                raise ValueError(f"{path.name}: format {case['format']} (section 11.2)")
            if case["layer"] not in OPERATORS:
                print(f"skipped {path.name}: layer {case['layer']}")
                continue
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        # np.array, not np.ascontiguousarray, which gives scalars an axis
        results = {name: np.array(value, order="C") for name, value in answer(case, tensors).items()}
        save_file(tensors | results, Path(answers) / path.name, metadata={"wora_case": text})
        written += 1
    print(f"{written} cases written to {answers}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
