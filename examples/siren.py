"""Coordinate networks: a sine network (Sitzmann et al. 2020) adapts to each of many images in three steps, from a start
that is learned for that (Tancik et al. 2021, "Learned Initializations for Optimizing Coordinate-Based Neural
Representations"). A task is an image, its rows are pixels.

    python examples/siren.py
"""

import argparse
import math

import torch
from torch import nn

from fastmeta import MAML
from fastmeta.tasks import TaskBatch, glyphs


class Sine(nn.Linear):
    """`sin(30 (W x + b))`, with the paper's initial weights (section 3.2)."""

    def __init__(self, inputs, outputs, first=False):
        super().__init__(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / 30
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x):
        return torch.sin(30 * super().forward(x))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tasks", type=int, default=16)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    images = {split: glyphs(split)[:, :4].flatten(0, 2).flatten(1).float() / 255 for split in ("train", "val")}
    side = torch.linspace(-1, 1, 28)
    places = torch.cartesian_prod(side, side)  # [784, 2]

    def batch(of, pixels):
        chosen = of[torch.randint(len(of), (args.tasks,))].unsqueeze(2)  # [T, 784, 1]
        place = torch.stack([torch.randperm(784)[:pixels] for _ in range(args.tasks)])
        rows = places[place], chosen.gather(1, place.unsqueeze(2))
        return TaskBatch(*rows, places.expand(args.tasks, -1, -1), chosen)  # some pixels tell all of them

    model = nn.Sequential(Sine(2, 64, first=True), Sine(64, 64), nn.Linear(64, 1))
    maml = MAML(model, inner_lr=1e-2, inner_steps=3, loss="mse")

    def judged():
        torch.manual_seed(1)
        with torch.no_grad():
            return -10 * math.log10(maml(batch(images["val"], 392)).loss.item())

    before = judged()
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    for _ in range(args.steps):
        optimizer.zero_grad()
        maml(batch(images["train"], 392)).loss.backward()
        optimizer.step()
    found = before, judged()
    print(f"new images from half of their pixels: {found[0]:.1f} dB before meta-training, {found[1]:.1f} dB after")
    return found


if __name__ == "__main__":
    main()
