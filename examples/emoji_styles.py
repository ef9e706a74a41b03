"""The same sign by another hand: a class is one emoji, its support picture by one artist, its query picture by another.

Training emoji are drawn by three artists; tasks take two of them at random. Judged on emoji of sub-categories that were
never trained on, 20-way 1-shot, beside the nearest neighbour on pixels.

    python examples/emoji_styles.py --data FOLDER/emoji
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import nn

from fastmeta.algorithms import NearestNeighbour, ProtoNet
from fastmeta.nn import conv4
from fastmeta.tasks import TaskBatch
from fastmeta.tasks.read import pictures
from fastmeta.training import Trainer, evaluate

STYLES, WAYS = ("noto", "twemoji", "openmoji"), 20


class Styles:
    """Tasks from pictures uint8 `[emoji, styles, C, H, W]`; of two given styles, or of two at random."""

    kind, output_size = "classification", WAYS

    def __init__(self, images, pair=None):
        self.images, self.pair, self.input_shape = images, pair, tuple(images.shape[2:])

    def sample(self, num_tasks, *, generator=None):
        chosen = torch.rand(num_tasks, len(self.images), generator=generator).topk(WAYS).indices
        styles = torch.rand(num_tasks, len(STYLES), generator=generator).topk(2).indices
        if self.pair is not None:
            styles = torch.tensor(self.pair).expand(num_tasks, 2)
        x = [self.images[chosen, styles[:, i : i + 1]].float() / 255 for i in (0, 1)]
        y = torch.arange(WAYS).repeat(num_tasks, 1)
        return TaskBatch(x[0], y, x[1], y)


def load(folder, split):
    """All emoji of the split, but country flags, which are easy."""
    rows = list(csv.DictReader(open(folder / "classes.csv", newline="", encoding="utf-8")))
    wanted = {r["codepoint"] for r in rows if r["split"] == split and r["subcategory"] != "country-flag"}
    found = []
    for style in STYLES:
        read, names = pictures(folder / f"{style}.zip", image_size=32)
        of = {Path(name).stem: row for name, row in zip(names, read, strict=True)}
        found.append(torch.stack([of[code] for code in sorted(wanted)]))
    return torch.stack(found, 1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--episodes", type=int, default=600)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    learner = ProtoNet(conv4(3, 64))
    trainer = Trainer(learner, Styles(load(args.data, "train")), task_batch=4, outer_lr=2e-3, minutes=args.minutes)
    trainer.run()
    test, found = load(args.data, "test"), {}
    pixels = NearestNeighbour(nn.Flatten(), centre="support", normalise=True)
    for other in (1, 2):
        for name, one in (("pixels", pixels), ("ProtoNet", learner)):
            accuracy = evaluate(one, Styles(test, (0, other)), episodes=args.episodes).accuracy
            found[name, STYLES[other]] = accuracy.mean
            told = f"{100 * accuracy.mean:.1f} ± {100 * accuracy.ci95:.1f} %"
            print(f"{STYLES[0]} to {STYLES[other]:9s} {name:9s} {told}, {WAYS}-way, {trainer.step} steps")
    return found


if __name__ == "__main__":
    main()
