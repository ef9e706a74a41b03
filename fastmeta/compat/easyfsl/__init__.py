"""Stands in for easyfsl 1.5.0: the same names, signatures and numbers on a current PyTorch.

    from fastmeta.compat.easyfsl.methods import PrototypicalNetworks
    from fastmeta.compat.easyfsl.samplers import TaskSampler

Where it differs:

- torchvision, pandas and tqdm are not needed to import it: what needs one says so when it is called. Without tqdm there
  is no progress bar.
- Distances to prototypes are those of `fastmeta.functional.pairwise_distance`: for many rows more exact than
  `torch.cdist`, and differentiable twice at every size.
- `PTMAP` can be trained through.
- The data sets `DanishFungi` and `MiniImageNet` are not here, which they say when they are called.

The vectorised way out of an evaluation is `fastmeta.ProtoNet(backbone, metric="euclidean")` on a batch of tasks.
"""

__version__ = "1.5.0"
