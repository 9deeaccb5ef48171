"""The cases of `wora bench`: shapes are read off their names."""
import re
import subprocess


def parse(name):
    """{"kind", and for linear n, i, o, r; for embedding n, v, d, r; for a convolution x, weight, r, stride, padding}."""
    kind, *parts = name.split("-")
    number = lambda key, default=None: next((int(m[1]) for p in parts if (m := re.fullmatch(key + r"(\d+)", p))), default)
    case = {"kind": kind, "r": number("r"), "n": number("n")}
    if kind == "linear":
        case["o"], case["i"] = map(int, parts[1].split("x"))
    elif kind == "embedding":
        case |= {"v": number("v"), "d": number("d")}
    else:
        x = [int(size) for size in parts[0].split("x")]
        spatial = len(x) - 2
        case |= {"x": x, "weight": [number("o"), x[1]] + [number("k")] * spatial, "stride": number("s", 1), "padding": number("p", 0)}
    return case


def names(wora, pattern):
    """The names of the cases that `wora bench` would time."""
    return subprocess.run([wora, "bench", pattern, "--list"], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
