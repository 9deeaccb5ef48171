"""Loads an adapter that woracle has written into Python's `peft` and compares what the two compute.

    cargo run --release --example write_adapter -- OUT_DIR
    python examples/load_in_peft.py OUT_DIR

Needs torch, peft and safetensors. Exits with 1 where an output is off by more than 1e-5.
"""

import pathlib
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn


class Text(nn.Module):
    """embedding, conv1d, mean, two linear layers"""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(23, 12), nn.Conv1d(12, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16, 20), nn.Linear(20, 5)

    def forward(self, ids):
        pooled = torch.relu(self.conv(self.embed(ids).transpose(1, 2))).mean(-1)
        return self.fc2(torch.relu(self.fc1(pooled)))


def main():
    out = pathlib.Path(sys.argv[1])
    model = Text()
    model.load_state_dict(load_file(out / "model.safetensors"))
    plain = model(load_file(out / "io.safetensors")["x"])
    adapted = PeftModel.from_pretrained(model, out / "adapter").eval()
    io = load_file(out / "io.safetensors")
    with torch.no_grad():
        worst = (adapted(io["x"]).double() - io["y"]).abs().max().item()
    moved = (plain.double() - io["y"]).abs().max().item()
    print(f"largest difference {worst:.2e}, where the adapter changes outputs by up to {moved:.2e}")
    sys.exit(0 if worst <= 1e-5 < moved else 1)


if __name__ == "__main__":
    main()
