"""One WoRA training step in PyTorch, computed as PEFT's layers do: prints one line of JSON a case."""
import argparse
import json
import time

import torch
import torch.nn.functional as F

from cases import parse

SCALING = 2.0


def random(*shape, dtype, scale=0.1, grad=False):
    return (torch.randn(*shape, dtype=dtype) * scale).requires_grad_(grad)


def step(name, dtype):
    """A function that runs the step, and the leaves that an update changes."""
    case = parse(name)
    make = lambda *shape, **options: random(*shape, dtype=dtype, **options)
    alpha, beta = (torch.tensor(value, dtype=dtype, requires_grad=True) for value in (1.1, 0.9))
    r = case["r"]
    if case["kind"] == "linear":
        n, i, o = case["n"], case["i"], case["o"]
        x, w, b, a, lb = make(n, i, grad=True), make(o, i, scale=0.05), make(o), make(r, i, grad=True), make(o, r, grad=True)
        m = w.norm(dim=1).requires_grad_()

        def forward():
            norm = (beta * w + alpha * SCALING * (lb @ a)).norm(dim=1).detach()
            base = F.linear(x, w)  # PEFT: the base layer's own output, then what the adapter adds to it
            gain = m / norm
            correction = (gain * beta - 1) * base + gain * alpha * SCALING * F.linear(F.linear(x, a), lb)
            return base + b + correction

        inputs = [x]
    elif case["kind"] == "embedding":
        n, v, d = case["n"], case["v"], case["d"]
        w, a, lb = make(v, d), make(r, v, grad=True), make(d, r, grad=True)
        ids = torch.randint(0, v, (n,))
        m = w.norm(dim=0).requires_grad_()

        def forward():
            norm = (beta * w + alpha * SCALING * (lb @ a).T).norm(dim=0).detach()
            gain = m / norm
            base = F.embedding(ids, w)
            return gain * (beta * base + alpha * SCALING * F.embedding(ids, a.T) @ lb.T)

        inputs = []
    else:
        shape, spatial = case["weight"], len(case["weight"]) - 2
        conv = [F.conv1d, F.conv2d, F.conv3d][spatial - 1]
        options = {"stride": case["stride"], "padding": case["padding"]}
        ones = [1] * spatial
        x, w, b = make(*case["x"], grad=True), make(*shape, scale=0.05), make(shape[0])
        a, lb = make(r, *shape[1:], grad=True), make(shape[0], r, *ones, grad=True)
        m = w.flatten(1).norm(dim=1).reshape(1, -1, *ones).requires_grad_()

        def forward():
            delta = (lb.flatten(1) @ a.flatten(1)).reshape(w.shape)
            norm = (beta * w + alpha * SCALING * delta).flatten(1).norm(dim=1).detach().reshape(1, -1, *ones)
            base = conv(x, w, **options)
            gain = m / norm
            correction = (gain * beta - 1) * base + gain * alpha * SCALING * conv(conv(x, a, **options), lb)
            return base + b.reshape(1, -1, *ones) + correction

        inputs = [x]
    learned = [a, lb, m, alpha, beta]
    with torch.no_grad():
        dy = torch.randn_like(forward())

    def run():
        for leaf in inputs + learned:
            leaf.grad = None
        forward().backward(dy)

    return run, learned


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--dtype", choices=["f32", "f64"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runs", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name in args.names:
        run, learned = step(name, {"f32": torch.float32, "f64": torch.float64}[args.dtype])
        run()
        times = []
        for nth in range(args.runs):
            with torch.no_grad():
                for leaf in learned:
                    leaf *= 1.001 if nth % 2 == 0 else 1 / 1.001
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        print(json.dumps({"name": name, "median_ms": sorted(times)[len(times) // 2]}), flush=True)


if __name__ == "__main__":
    main()
