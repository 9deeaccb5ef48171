"""Merges a DoRA adapter into a base of 1 GB in four shards: PEFT, then wora, in turn.

PEFT's time is that of `merge_and_unload` and of saving the merged weights; its base is in memory. wora's is that of the
whole command, which reads the base, merges, and writes. Needs torch, peft and safetensors, and a release build of wora.
"""
import argparse
import json
import pathlib
import subprocess
import tempfile
import time

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

WORA = pathlib.Path(__file__).resolve().parent.parent.parent / "target" / "release" / "wora"
FEATURES, WEIGHTS, SHARDS = 4096, 16, 4


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(WEIGHTS))


def save_shards(model, directory):
    directory.mkdir()
    weights, index = model.state_dict(), {}
    for shard in range(SHARDS):
        part = {name: weight for nth, (name, weight) in enumerate(weights.items()) if nth % SHARDS == shard}
        save_file(part, directory / f"model-{shard}.safetensors")
        index.update({name: f"model-{shard}.safetensors" for name in part})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wora", default=str(WORA), help="the command to measure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory)
            model = Stack()
            save_shards(model, path / "base")
            # Half of the weights are adapted.
            targets = [f"layers.{nth}" for nth in range(0, WEIGHTS, 2)]
            adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=targets))
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.01)
            adapted.save_pretrained(path / "adapter")
            start = time.perf_counter()
            save_shards(adapted.merge_and_unload(), path / "peft")
            peft = time.perf_counter() - start
            command = [args.wora, "merge", "--base", path / "base", "--adapter", path / "adapter", "--out", path / "wora"]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"PEFT {peft:.2f} s, wora {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
