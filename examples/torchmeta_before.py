"""A prototypical network as torchmeta's users write it: only the imports are changed.

    python examples/torchmeta_before.py [--folder WITH_OMNIGLOT]
"""

import argparse
import time

import torch
from torch import nn

from fastmeta.compat.torchmeta.datasets.helpers import omniglot, to_tensor
from fastmeta.compat.torchmeta.transforms import Categorical, ClassSplitter, Rotation
from fastmeta.compat.torchmeta.utils.data import BatchMetaDataLoader, ClassDataset, CombinationMetaDataset, Dataset
from fastmeta.compat.torchmeta.utils.prototype import get_prototypes, prototypical_loss
from fastmeta.tasks import glyphs

WAYS, SHOTS, QUERY_SHOTS, TASKS = 5, 5, 15, 32


class Glyph(Dataset):
    def __init__(self, index, images, transform, target_transform):
        super().__init__(index, transform, target_transform)
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        from PIL import Image

        image = Image.fromarray(self.images[index, 0].numpy())
        return self.transform(image), self.target_transform(self.index)


class Glyphs(ClassDataset):
    def __init__(self, split):
        super().__init__(meta_split=split, class_augmentations=[Rotation([90, 180, 270])])
        self.images = glyphs(split)

    @property
    def num_classes(self):
        return len(self.images)

    def __getitem__(self, index):
        images = self.images[index % self.num_classes]
        return Glyph(index, images, self.get_transform(index, to_tensor), self.get_target_transform(index))


def tasks(folder, split):
    if folder:
        return omniglot(folder, shots=SHOTS, ways=WAYS, test_shots=QUERY_SHOTS, meta_split=split)
    dataset = CombinationMetaDataset(Glyphs(split), WAYS, target_transform=Categorical(WAYS))
    return ClassSplitter(dataset, num_train_per_class=SHOTS, num_test_per_class=QUERY_SHOTS)


def main(steps, folder, seed=0):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    loader = BatchMetaDataLoader(tasks(folder, "val"), batch_size=TASKS)
    losses, seconds = [], -time.perf_counter()
    for _, batch in zip(range(steps), loader, strict=False):
        (x, y), (query_x, query_y) = batch["train"], batch["test"]
        embeddings = encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        query_embeddings = encoder(query_x.flatten(0, 1)).unflatten(0, query_x.shape[:2])
        prototypes = get_prototypes(embeddings, y, WAYS)
        loss = prototypical_loss(prototypes, query_embeddings, query_y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds += time.perf_counter()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {1000 * seconds / steps:.1f} ms a step of {TASKS} tasks")
    return losses, seconds / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder")
    main(**vars(parser.parse_args()))
