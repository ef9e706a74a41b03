"""MAML as a Lightning module: an algorithm is an nn.Module, so Lightning's trainer takes it as any other.

    pip install lightning
    python examples/lightning_module.py
"""

import sys

import torch
from torch.utils.data import DataLoader, IterableDataset

from fastmeta.algorithms import MAML
from fastmeta.nn import mlp
from fastmeta.tasks import EpisodeSampler, TaskBatch, glyphs

try:
    import lightning
except ImportError:
    try:
        import pytorch_lightning as lightning
    except ImportError:
        sys.exit("this example needs Lightning: pip install lightning")


class Episodes(IterableDataset):
    """Task batches without end: a loader with batch_size=None hands them on as they are."""

    def __init__(self, tasks, task_batch: int):
        self.tasks, self.task_batch = tasks, task_batch

    def __iter__(self):
        while True:
            yield tuple(self.tasks.sample(self.task_batch))


class FewShot(lightning.LightningModule):
    def __init__(self, ways: int):
        super().__init__()
        self.learner = MAML(mlp([28 * 28, 64, 64, ways]), inner_lr=0.1, inner_steps=3)

    def training_step(self, batch, index):
        output = self.learner(TaskBatch(*batch))
        self.log_dict({"loss": output.loss, "accuracy": output.accuracy.mean()}, prog_bar=True)
        return output.loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(steps: int = 200, ways: int = 5) -> FewShot:
    tasks = EpisodeSampler(glyphs("train"), ways=ways, shots=1, query_shots=5)
    module = FewShot(ways)
    loader = DataLoader(Episodes(tasks, 8), batch_size=None)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "auto", "devices": 1}
    lightning.Trainer(max_steps=steps, **options).fit(module, loader)
    return module


if __name__ == "__main__":
    main()
