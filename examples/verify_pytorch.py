"""Answers case files with a WoRA layer written in PyTorch, for `wora verify` to judge.

    wora golden cases --without-answers
    python examples/verify_pytorch.py cases answers
    wora verify answers

Needs torch and safetensors. Put your own layer in the place of `wora`.
"""

import argparse
import json
import pathlib

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file


# What is computed on the way, and the result: a case written with answers has them too.
STAGES = ("weighted", "weight_norm", "gain", "merged_weight", "y")


def delta_weight(a, b, groups):
    """B A for each group: [units, fan_in]."""
    a, b = a.flatten(1), b.flatten(1)
    pairs = zip(a.chunk(groups, dim=0), b.chunk(groups, dim=0))
    return torch.cat([b @ a for a, b in pairs])


def wora(layer, settings, t):
    """y of one case; t holds its tensors, the differentiated ones with requires_grad."""
    one = torch.ones((), dtype=t["base.weight"].dtype)
    alpha, beta, s = t.get("lora_wora_alpha", one), t.get("lora_wora_beta", one), settings["scaling"]
    embedding, fan_in_fan_out = layer == "embedding", settings.get("fan_in_fan_out", False)
    w = t["base.weight"]
    base = w.T if embedding or fan_in_fan_out else w.flatten(1)  # [units, fan_in]
    a, b = (t[f"lora_{'embedding_' if embedding else ''}{name}"] for name in "AB")
    v = beta * base + alpha * s * delta_weight(a, b, settings.get("groups", 1))
    gain = torch.ones_like(v[:, :1])
    if settings.get("method", "wora") != "lora":
        axis = 0 if settings.get("norm_axis") == "input" else 1
        largest = v.detach().abs().amax(dim=axis, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        norm = largest * (v / largest).norm(dim=axis, keepdim=True)  # so that no square vanishes
        n = torch.where(norm == 0, norm, norm + settings.get("norm_eps", 0.0))
        n = n if settings.get("norm_gradient") == "full" else n.detach()
        m = t["lora_magnitude_vector"].reshape(n.shape)
        gain = torch.where(n == 0, torch.zeros_like(n), m / torch.where(n == 0, torch.ones_like(n), n))
    if embedding:  # the lookup, and not the norm, knows padding_idx and scale_grad_by_freq
        pad, by_freq = settings.get("padding_idx"), settings.get("scale_grad_by_freq", False)
        rows = [F.embedding(t["x"], table, pad, scale_grad_by_freq=by_freq) for table in (w, a.T.contiguous())]
        y = gain[:, 0] * (beta * rows[0] + alpha * s * rows[1] @ b.T)
        return y * (1.0 if settings.get("embed_scale") is None else settings["embed_scale"])
    adapted = (gain * v).reshape(w.shape) if not fan_in_fan_out else (gain * v).T
    x, mask = t["x"], t.get("dropout_mask")
    if mask is None:
        y = operator(layer, settings, x, adapted)
    else:
        y = operator(layer, settings, x, w) + operator(layer, settings, x * mask, adapted - w)
    if "base.bias" in t:
        spatial = 0 if layer == "linear" else int(layer[4])
        y = y + t["base.bias"].reshape(-1, *[1] * spatial)
    return y


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
    mode = settings.get("padding_mode", "zeros")
    batched = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    flat = [n for side in reversed(sides) for n in side]
    if any(flat):
        batched = F.pad(batched, flat, mode="constant" if mode == "zeros" else mode)
    conv = [F.conv1d, F.conv2d, F.conv3d][spatial - 1]
    y = conv(batched, weight, None, each(settings.get("stride", 1)), 0, dilation, settings.get("groups", 1))
    return y if x.dim() == spatial + 2 else y.squeeze(0)


def gradient(leaf):
    """What reaches a leaf: zeros where the graph does not, as an optimiser sees it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def answer(path, out, wrong):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        t = {name: file.get_tensor(name) for name in file.keys()}
    settings = json.loads(metadata["wora_case"])
    inputs = {n: v for n, v in t.items() if n not in STAGES and (n == "grad.y" or not n.startswith("grad."))}
    dy = inputs.get("grad.y")
    leaves = {n: v.clone().requires_grad_() for n, v in inputs.items()
              if v.is_floating_point() and n not in ("grad.y", "dropout_mask")}
    y = wora(settings["layer"], settings, {**inputs, **leaves})
    if wrong and "base.bias" in leaves:  # a mistake for `wora verify` to find: the bias counted twice
        y = y + leaves["base.bias"].reshape(-1, *[1] * (0 if settings["layer"] == "linear" else int(settings["layer"][4])))
    if dy is not None:
        y.backward(dy)
    answers = {"y": y.detach(), **({} if dy is None else {f"grad.{n}": gradient(v) for n, v in leaves.items()})}
    save_file({n: v.clone().contiguous() for n, v in {**inputs, **answers}.items()}, out / path.name, metadata)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=pathlib.Path)
    parser.add_argument("answers", type=pathlib.Path)
    parser.add_argument("--wrong", action="store_true", help="make a mistake, to see it found")
    args = parser.parse_args()
    args.answers.mkdir(parents=True, exist_ok=True)
    for path in sorted(args.cases.glob("*.safetensors")):
        answer(path, args.answers, args.wrong)


if __name__ == "__main__":
    main()
