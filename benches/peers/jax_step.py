"""One WoRA training step under jax.jit: prints one line of JSON a case."""
import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cases import parse

jax.config.update("jax_enable_x64", True)
SCALING = 2.0


def step(name, dtype):
    """A compiled step of (x, A, B, m, alpha, beta), and those; x is missing where there are ids."""
    case = parse(name)
    generator = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(generator.standard_normal(shape) * 0.1, dtype)
    r = case["r"]
    if case["kind"] == "linear":
        n, i, o = case["n"], case["i"], case["o"]
        w, b, x, a, lb, m = make(o, i), make(o), make(n, i), make(r, i), make(o, r), jnp.abs(make(o)) + 1

        def forward(x, a, lb, m, alpha, beta):
            norm = lax.stop_gradient(jnp.linalg.norm(beta * w + alpha * SCALING * (lb @ a), axis=1))
            return m / norm * (beta * (x @ w.T) + alpha * SCALING * ((x @ a.T) @ lb.T)) + b

        leaves, dy = [x, a, lb, m], make(n, o)
    elif case["kind"] == "embedding":
        n, v, d = case["n"], case["v"], case["d"]
        w, a, lb, m = make(v, d), make(r, v), make(d, r), jnp.abs(make(d)) + 1
        ids = jnp.asarray(generator.integers(0, v, n))

        def forward(a, lb, m, alpha, beta):
            norm = lax.stop_gradient(jnp.linalg.norm(beta * w + alpha * SCALING * (a.T @ lb.T), axis=0))
            return m / norm * (beta * w[ids] + alpha * SCALING * (a.T[ids] @ lb.T))

        leaves, dy = [a, lb, m], make(n, d)
    else:
        shape, spatial = case["weight"], len(case["weight"]) - 2
        ones = (1,) * spatial
        w, b, x, a, lb = make(*shape), make(shape[0]), make(*case["x"]), make(r, *shape[1:]), make(shape[0], r, *ones)
        m = jnp.abs(make(shape[0])) + 1
        conv = lambda x, w, stride, padding: lax.conv_general_dilated(x, w, (stride,) * spatial, [(padding, padding)] * spatial)

        def forward(x, a, lb, m, alpha, beta):
            delta = lb.reshape(shape[0], r) @ a.reshape(r, -1)
            norm = lax.stop_gradient(jnp.linalg.norm(beta * w.reshape(shape[0], -1) + alpha * SCALING * delta, axis=1))
            base, u = conv(x, w, case["stride"], case["padding"]), conv(x, a, case["stride"], case["padding"])
            channels = (1, -1) + ones
            return (m / norm).reshape(channels) * (beta * base + alpha * SCALING * conv(u, lb, 1, 0)) + b.reshape(channels)

        leaves = [x, a, lb, m]
        dy = make(*jax.eval_shape(forward, *leaves, jnp.asarray(1.1, dtype), jnp.asarray(0.9, dtype)).shape)
    leaves += [jnp.asarray(1.1, dtype), jnp.asarray(0.9, dtype)]

    @jax.jit
    def run(leaves, dy):
        y, pull_back = jax.vjp(forward, *leaves)
        return y, pull_back(dy)

    first_learned = 0 if case["kind"] == "embedding" else 1
    return (lambda leaves: jax.block_until_ready(run(leaves, dy))), leaves, first_learned


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--dtype", choices=["f32", "f64"], required=True)
    parser.add_argument("--runs", type=int, required=True)
    args = parser.parse_args()
    for name in args.names:
        run, leaves, first_learned = step(name, {"f32": jnp.float32, "f64": jnp.float64}[args.dtype])
        run(leaves)
        times = []
        for nth in range(args.runs):
            factor = 1.001 if nth % 2 == 0 else 1 / 1.001
            leaves = leaves[:first_learned] + [leaf * factor for leaf in leaves[first_learned:]]
            jax.block_until_ready(leaves)
            start = time.perf_counter()
            run(leaves)
            times.append((time.perf_counter() - start) * 1e3)
        print(json.dumps({"name": name, "median_ms": sorted(times)[len(times) // 2]}), flush=True)


if __name__ == "__main__":
    main()
