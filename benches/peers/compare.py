"""Runs `wora bench`, PyTorch and JAX in turn, in one sitting, and prints how many times faster wora is than the faster one.

Needs torch and jax, and a release build of wora. Every case is measured in several rounds, each of the three once a
round; a time is the median over the rounds of the median over the runs.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

from cases import names

HERE = pathlib.Path(__file__).resolve().parent
WORA = HERE.parent.parent / "target" / "release" / "wora"


def lines(command, threads):
    """What a command prints, a line of JSON each; no more threads than are asked for."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          preexec_fn=lambda: os.sched_setaffinity(0, cores))
    return [json.loads(line) for line in done.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filter", nargs="?", default="")
    parser.add_argument("--dtype", choices=["f32", "f64"], action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wora", default=str(WORA), help="the command to measure")
    args = parser.parse_args()
    threads, runs = str(args.threads), str(args.runs)
    print("| case | dtype | wora ms | PyTorch ms | JAX ms | faster peer / wora | % of matmul |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in args.dtype or ["f64", "f32"]:
        for name in names(args.wora, args.filter):
            commands = {
                "wora": [args.wora, "bench", name, "--dtype", dtype, "--threads", threads, "--runs", runs, "--json"],
                "torch": [sys.executable, HERE / "torch_step.py", name, "--dtype", dtype, "--threads", threads, "--runs", runs],
                "jax": [sys.executable, HERE / "jax_step.py", name, "--dtype", dtype, "--runs", runs],
            }
            rounds = [{who: lines(command, args.threads)[0] for who, command in commands.items()} for _ in range(args.rounds)]
            ms = {who: statistics.median(each[who]["median_ms"] for each in rounds) for who in commands}
            percent = statistics.median(each["wora"]["percent_of_matmul"] for each in rounds)
            ratio = min(ms["torch"], ms["jax"]) / ms["wora"]
            print(f"| {name} | {dtype} | {ms['wora']:.2f} | {ms['torch']:.2f} | {ms['jax']:.2f} | {ratio:.2f} | {percent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
