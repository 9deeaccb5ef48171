"""Answers case files with a WoRA layer written in JAX, for `wora verify` to judge.

    wora golden cases --without-answers
    python examples/verify_jax.py cases answers
    wora verify answers

Needs jax and safetensors. Put your own layer in the place of `wora`.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
from safetensors import safe_open
from safetensors.flax import save_file

jax.config.update("jax_enable_x64", True)


# What is computed on the way, and the result: a case written with answers has them too.
STAGES = ("weighted", "weight_norm", "gain", "merged_weight", "y")


def delta_weight(a, b, groups):
    """B A for each group: [units, fan_in]."""
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    return jnp.concatenate([b @ a for a, b in zip(jnp.split(a, groups), jnp.split(b, groups))])


def wora(layer, settings, t):
    """y of one case; t holds its tensors."""
    alpha, beta, s = t.get("lora_wora_alpha", 1.0), t.get("lora_wora_beta", 1.0), settings["scaling"]
    embedding, fan_in_fan_out = layer == "embedding", settings.get("fan_in_fan_out", False)
    a, b = (t[f"lora_{'embedding_' if embedding else ''}{name}"] for name in "AB")
    w = t["base.weight"]
    base = w.T if embedding or fan_in_fan_out else w.reshape(w.shape[0], -1)  # [units, fan_in]
    v = beta * base + alpha * s * delta_weight(a, b, settings.get("groups", 1))
    gain = jnp.ones_like(v[:, :1])
    if settings.get("method", "wora") != "lora":
        axis = 0 if settings.get("norm_axis") == "input" else 1
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(v), axis=axis, keepdims=True))
        dead = largest == 0
        unit = jnp.where(dead, 1.0, v) / jnp.where(dead, 1.0, largest)  # so that no square vanishes
        n = largest * jnp.sqrt(jnp.sum(unit * unit, axis=axis, keepdims=True)) + settings.get("norm_eps", 0.0)
        n = n if settings.get("norm_gradient") == "full" else jax.lax.stop_gradient(n)
        gain = jnp.where(dead, 0.0, t["lora_magnitude_vector"].reshape(n.shape) / jnp.where(dead, 1.0, n))
    if embedding:  # the lookup, and not the norm, knows padding_idx and scale_grad_by_freq
        keep = fraction(settings, t["x"], w)
        rows_of_w, rows_of_a = (damped(table, keep)[t["x"]] for table in (w, a.T))
        y = gain[:, 0] * (beta * rows_of_w + alpha * s * rows_of_a @ b.T)
        return y * (1.0 if settings.get("embed_scale") is None else settings["embed_scale"])
    adapted = (gain * v).T if fan_in_fan_out else (gain * v).reshape(w.shape)
    x, mask = t["x"], t.get("dropout_mask")
    if mask is None:
        y = operator(layer, settings, x, adapted)
    else:
        y = operator(layer, settings, x, w) + operator(layer, settings, x * mask, adapted - w)
    if "base.bias" in t:
        y = y + t["base.bias"].reshape(-1, *[1] * (0 if layer == "linear" else int(layer[4])))
    return y


def fraction(settings, ids, table):
    """How much of the lookup's gradient reaches each row."""
    keep = jnp.ones(table.shape[0], table.dtype)
    if settings.get("scale_grad_by_freq"):
        keep = keep / jnp.maximum(1, jnp.bincount(ids.reshape(-1), length=table.shape[0])).astype(table.dtype)
    padding_idx = settings.get("padding_idx")
    return keep if padding_idx is None else keep.at[padding_idx].set(0)


def damped(table, keep):
    """The table, of whose gradient only a fraction counts."""
    still = jax.lax.stop_gradient(table)
    return still + keep[:, None] * (table - still)


def operator(layer, settings, x, weight):
    if layer == "linear":
        return x @ (weight if settings.get("fan_in_fan_out", False) else weight.T)
    spatial = int(layer[4])
    each = lambda value: [value] * spatial if isinstance(value, int) else list(value)
    dilation, padding = each(settings.get("dilation", 1)), settings.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        sides = [(n // 2, n - n // 2) for n in total]
    else:
        sides = [(n, n) for n in each(0 if padding == "valid" else padding)]
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    batched = x if x.ndim == spatial + 2 else x[None]
    batched = jnp.pad(batched, [(0, 0), (0, 0), *sides], mode=mode[settings.get("padding_mode", "zeros")])
    y = jax.lax.conv_general_dilated(batched, weight, each(settings.get("stride", 1)), "VALID", rhs_dilation=dilation,
                                     feature_group_count=settings.get("groups", 1))
    return y if x.ndim == spatial + 2 else y[0]


def answer(path, out):
    with safe_open(path, "flax") as file:
        metadata = file.metadata()
        t = {name: file.get_tensor(name) for name in file.keys()}
    settings = json.loads(metadata["wora_case"])
    inputs = {n: v for n, v in t.items() if n not in STAGES and (n == "grad.y" or not n.startswith("grad."))}
    moving = [n for n, v in inputs.items() if jnp.issubdtype(v.dtype, jnp.floating) and n not in ("grad.y", "dropout_mask")]
    y, pullback = jax.vjp(lambda leaves: wora(settings["layer"], settings, {**inputs, **leaves}), {n: inputs[n] for n in moving})
    answers = {"y": y}
    if "grad.y" in inputs:
        (gradients,) = pullback(inputs["grad.y"])
        answers.update({f"grad.{n}": g for n, g in gradients.items()})
    save_file({**inputs, **answers}, out / path.name, metadata)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=pathlib.Path)
    parser.add_argument("answers", type=pathlib.Path)
    args = parser.parse_args()
    args.answers.mkdir(parents=True, exist_ok=True)
    for path in sorted(args.cases.glob("*.safetensors")):
        answer(path, args.answers)


if __name__ == "__main__":
    main()
