"""Repeats the first steps of `wora train` in PyTorch: the same tensors, the same batches, the layer as PEFT's layers do it.

    python benches/peers/train.py examples/digits-cnn.toml --dtype f64

Prints for every configuration, type of numbers and stage the largest difference between the losses, and the median time of
a step of both. Fails where losses differ by more than 1e-4 in f32 or 1e-9 in f64. Needs torch and safetensors, and a
release build of wora. In f32, rounding decides a ReLU or a pool otherwise once in some hundred steps, and the curves part
there: so they do with some seeds. In PyTorch, the time of a step is without that of collecting its batch. Times mean something only on
a machine that does nothing else: threads that wait for each other, as PyTorch's do, wait for other processes too.
"""
import argparse
import collections
import json
import math
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
WORA = ROOT / "target" / "release" / "wora"
CONFIGS = [ROOT / "examples" / "digits-cnn.toml", ROOT / "examples" / "chars-transformer.toml"]
LIMITS = {"f32": 1e-4, "f64": 1e-9}
WARM_UP, SPARE = 5, 10


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Positions(nn.Module):
    def __init__(self, max_length, embedding_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, embedding_dim))

    def forward(self, x):
        return x + self.weight[: x.shape[1]]


class SelfAttention(nn.Module):
    def __init__(self, embed_dim, num_heads=1, causal=False, bias=True):
        super().__init__()
        self.heads, self.causal = num_heads, causal
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(embed_dim, embed_dim, bias=bias))

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Mean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return x.mean(self.dim)


class Adapted(nn.Module):
    """A frozen linear layer or convolution under LoRA, DoRA or WoRA, named as in wora's files."""

    def __init__(self, layer, method, scaling, shapes):
        super().__init__()
        self.weight, self.bias, self.method, self.scaling = layer.weight, layer.bias, method, scaling
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if isinstance(layer, nn.Linear):
            self.apply_a = self.pointwise = F.linear
        else:
            options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self.pointwise = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[self.weight.ndim]
            self.apply_a = lambda x, weight, bias=None: self.pointwise(x, weight, bias, **options)

    def forward(self, x):
        y = self.apply_a(x, self.weight, self.bias)
        lora = self.pointwise(self.apply_a(x, self.lora_A), self.lora_B)
        if self.method == "lora":
            return y + lora * self.scaling
        alpha, beta = (self.lora_wora_alpha, self.lora_wora_beta) if self.method == "wora" else (1.0, 1.0)
        channels = (-1,) + (1,) * (self.weight.ndim - 2)
        with torch.no_grad():  # PEFT: the norm counts as a constant
            delta = (self.lora_B.flatten(1) @ self.lora_A.flatten(1)).reshape(self.weight.shape)
            norm = (beta * self.weight + alpha * self.scaling * delta).flatten(1).norm(dim=1)
        gain = (self.lora_magnitude_vector.flatten() / norm).reshape(channels)
        base = y if self.bias is None else y - self.bias.reshape(channels)
        return y + (gain * beta - 1) * base + gain * alpha * self.scaling * lora


def refuse(what):
    sys.exit(f"{what} cannot be repeated here")


TYPES = {
    "linear": nn.Linear, "embedding": nn.Embedding, "conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d,
    "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "max_pool1d": nn.MaxPool1d, "max_pool2d": nn.MaxPool2d,
    "avg_pool1d": nn.AvgPool1d, "avg_pool2d": nn.AvgPool2d, "mean": Mean, "flatten": nn.Flatten,
    "layer_norm": lambda features, eps=1e-5: nn.LayerNorm(features, eps), "self_attention": SelfAttention,
    "position_embedding": Positions, "dropout": lambda: nn.Identity(),
}


def build(modules, kind=nn.Sequential):
    """The modules of a configuration, one after the other."""
    named = collections.OrderedDict()
    for number, settings in enumerate(modules):
        settings = dict(settings)
        name, type_ = settings.pop("name", str(number)), settings.pop("type")
        if settings.pop("p" if type_ == "dropout" else "dropout", 0) > 0 or settings.pop("embed_scale", None) is not None:
            refuse(f"{name}: dropout or embed_scale")
        named[name] = build(settings["modules"], Residual) if type_ == "residual" else TYPES[type_](**settings)
    return kind(named)


def adapt(model, table, tensors):
    """Puts adapters on the layers that the table names."""
    for key, usual in {"lora_dropout": 0.0, "norm_gradient": "detached", "rank_pattern": {}, "alpha_pattern": {}}.items():
        if table.get(key, usual) != usual:
            refuse(f"adapter.{key}")
    targets, rank = table["target_modules"], table["rank"]
    scaling = table["lora_alpha"] / (math.sqrt(rank) if table.get("use_rslora") else rank)
    for name, layer in list(model.named_modules()):
        if isinstance(targets, str):
            targeted = re.fullmatch(targets, name)
        else:
            targeted = any(name == target or name.endswith("." + target) for target in targets)
        if targeted and isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if isinstance(layer, nn.Embedding) or getattr(layer, "groups", 1) > 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
                refuse(f"{name}: an adapter on an embedding, on groups, or on padding that is not zeros")
            start = name + ".lora_"
            shapes = {key.removeprefix(name + "."): value.shape for key, value in tensors.items() if key.startswith(start)}
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapted(layer, table["method"], scaling, shapes))


def make_optimiser(model, table):
    """As wora's: rates by the kind of tensor; decay for weights of two axes or more, and not for magnitudes."""
    kinds = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "magnitude"}
    kinds |= {"lora_wora_alpha": "alpha_beta", "lora_wora_beta": "alpha_beta"}
    groups = collections.defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            rate = table.get("learning_rates", {}).get(kinds.get(last), table["learning_rate"])
            groups[rate, parameter.ndim >= 2 and last != "lora_magnitude_vector"].append(parameter)
    adam = table["type"] == "adamw"
    decay = table.get("weight_decay", 0.01 if adam else 0.0)
    groups = [{"params": each, "lr": rate, "full": rate, "weight_decay": decay if decays else 0.0}
              for (rate, decays), each in groups.items()]
    if adam:
        return torch.optim.AdamW(groups, betas=tuple(table.get("betas", (0.9, 0.999))), eps=table.get("eps", 1e-8))
    return torch.optim.SGD(groups, momentum=table.get("momentum", 0.0))


def factor(schedule, step, steps):
    """What the rates of a step, counted from 0, are multiplied by."""
    warmup, decay, floor = schedule.get("warmup", 0), schedule.get("decay", "constant"), schedule.get("floor", 0.0)
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[decay]
    return 1.0 if decay == "constant" else floor + (1 - floor) * left


def batches_of(trace, step, ids):
    """The batches of a step, which make one step together."""
    batches = []
    while (x := trace.get(f"batch.{step}.{len(batches)}.x")) is not None:
        batches.append((x.long() if ids else x, trace[f"batch.{step}.{len(batches)}.targets"]))
    return batches


def repeat(config, stage, trace, steps):
    """The losses, factors and seconds of a stage's first steps."""
    table, modules = config[stage], config["model"]["modules"]
    tensors = {name.split(".", 1)[1]: values for name, values in trace.items() if not name.startswith("batch.")}
    model = build(modules)
    if stage == "adapt":
        adapt(model, config["adapter"], tensors)
    model.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)  # no tensor missing, and none too many
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("trained." + name in trace)
    optimiser, learned = make_optimiser(model, table["optimiser"]), [p for p in model.parameters() if p.requires_grad]
    all_batches = [batches_of(trace, step, modules[0]["type"] == "embedding") for step in range(steps)]
    with torch.no_grad():
        shape = model(all_batches[0][0][0]).shape
    # Classes have the shape of the output without its last axis; values have that of the output.
    classes = all_batches[0][0][1].shape == shape[:-1]
    cast = torch.Tensor.long if classes else torch.Tensor.contiguous
    all_batches = [[(x, cast(targets)) for x, targets in batches] for batches in all_batches]
    loss_of = (lambda y, t: F.cross_entropy(y.flatten(0, -2), t.flatten())) if classes else F.mse_loss
    losses, factors, seconds = [], [], []
    for step, batches in enumerate(all_batches):
        start, loss, samples = time.perf_counter(), 0.0, sum(len(x) for x, _ in batches)
        factors.append(factor(table.get("schedule", {}), step, table["steps"]))
        for group in optimiser.param_groups:
            group["lr"] = group["full"] * factors[-1]
        optimiser.zero_grad()
        for x, targets in batches:
            part = loss_of(model(x), targets) * (len(x) / samples)
            part.backward()
            loss += part.item()
        if "clip" in table:
            nn.utils.clip_grad_norm_(learned, table["clip"])
        optimiser.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    return losses, factors, seconds


def shortened(text, dtype, steps):
    """The configuration in these numbers, with so many steps a stage, and no evaluation between them."""
    text = re.sub(r"(?m)^(dtype|evaluate_every|patience)\s*=.*\n", "", text)
    text = re.sub(r"(?m)^(epochs|steps)\s*=.*$", f"steps = {steps}\nevaluate_every = 1000000", text)
    return f'dtype = "{dtype}"\n' + text


def run_wora(wora, path, dtype, steps, threads, seed=None):
    """The configuration as it was run, and a stage's trace and lines by its name."""
    # What a configuration names is looked for from its own directory.
    copy = path.parent / f".{path.stem}-{os.getpid()}.toml"
    text = shortened(path.read_text(), dtype, steps + SPARE)
    config = tomllib.loads(text)
    stages = [stage for stage in ("pretrain", "adapt") if stage in config]
    assert config["dtype"] == dtype and all(config[stage]["steps"] == steps + SPARE for stage in stages), text
    with tempfile.TemporaryDirectory() as out:
        try:
            copy.write_text(text)
            command = [wora, "train", copy, "--out", out, "--trace", str(steps), "--threads", str(threads)]
            command += [] if seed is None else ["--seed", str(seed)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finally:
            copy.unlink(missing_ok=True)
        lines = [json.loads(line) for line in (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()]
        of = lambda stage: [line for line in lines if line["stage"] == stage and "validation" not in line][:steps]
        return config, {stage: (load_file(f"{out}/trace-{stage}.safetensors"), of(stage)) for stage in stages}


def compare(wora, path, dtype, args):
    """One line a stage."""
    found = collections.defaultdict(lambda: {"differences": [], "torch": [], "wora": []})
    for _ in range(args.rounds):
        config, stages = run_wora(wora, path, dtype, args.steps, args.threads, args.seed)
        for stage, (trace, lines) in stages.items():
            losses, factors, seconds = repeat(config, stage, trace, args.steps)
            assert len(lines) == args.steps
            for line, expected in zip(lines, factors):
                assert math.isclose(line["rate"], expected, rel_tol=1e-12), f"{stage}: {line}, expected a rate of {expected}"
            found[stage]["differences"] += [abs(loss - line["loss"]) for loss, line in zip(losses, lines)]
            found[stage]["torch"] += seconds[WARM_UP:]
            found[stage]["wora"] += [line["seconds"] for line in lines[WARM_UP:]]
    for stage, each in found.items():
        difference = torch.tensor(each["differences"], dtype=torch.float64).max().item()  # NaN where one is
        torch_ms, wora_ms = (1e3 * statistics.median(each[who]) for who in ("torch", "wora"))
        yield {"config": path.stem, "dtype": dtype, "stage": stage, "steps": args.steps, "loss_difference": difference,
               "torch_ms": torch_ms, "wora_ms": wora_ms, "ratio": torch_ms / wora_ms, "agrees": difference <= LIMITS[dtype]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=pathlib.Path, default=CONFIGS)
    parser.add_argument("--dtype", choices=["f32", "f64"], action="append")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, help="in place of the configuration's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print a list instead of a table")
    parser.add_argument("--wora", default=str(WORA), help="the command to measure")
    args = parser.parse_args()
    if args.steps <= WARM_UP or args.rounds < 1:
        parser.error(f"expected more than {WARM_UP} steps and at least one round")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copy of the configuration is taken away
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: other processes are running (load {load:.1f}), and times mean little", file=sys.stderr)
    if not args.json:
        print(f"{'config':20} {'dtype':5} {'stage':8} {'loss difference':>15} {'PyTorch ms':>10} {'wora ms':>8} {'PyTorch / wora':>14}")
    results = []
    for path in args.configs:
        for dtype in args.dtype or ["f64", "f32"]:
            for line in compare(args.wora, path, dtype, args):
                results.append(line)
                if not args.json:
                    print(f"{line['config']:20} {dtype:5} {line['stage']:8} {line['loss_difference']:15.1e} {line['torch_ms']:10.2f} "
                          f"{line['wora_ms']:8.2f} {line['ratio']:14.2f}{'' if line['agrees'] else '  DIFFERENT'}", flush=True)
    if args.json:
        print(json.dumps(results, indent=2))
    sys.exit(not all(line["agrees"] for line in results))


if __name__ == "__main__":
    main()
