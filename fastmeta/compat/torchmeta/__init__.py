"""Stands in for torchmeta 1.8.0: the same names, signatures and numbers on a current PyTorch.

    from fastmeta.compat import torchmeta
    from fastmeta.compat.torchmeta.modules import MetaModule, MetaSequential, MetaLinear

Where it differs:

- Layers take parameters with a task dimension (`modules`): one call serves all tasks.
- torchvision, h5py and ordered-set are not needed; transforms of torchvision work where they are installed.
- Rows of `utils.data.NonEpisodicWrapper` have the class that they say.
- Of the data sets only Omniglot is here, of 28 x 28 images (`datasets`), and the toy problems.
- What fails in torchmeta by mistake works: `get_subdict(params)` without a key gives `params`, a meta-data set of
  combinations can be iterated, `WeightedClassSplitter` splits tasks of several classes, `MetaMultiheadAttention` takes
  `batch_first`.

The vectorised way out of a MAML loop is `utils.gradient_based.task_parameters`, or `fastmeta.MAML(model)`, which takes
a `MetaModule` as any other module.
"""

from fastmeta.compat.torchmeta import datasets, modules, toy, transforms, utils
from fastmeta.compat.torchmeta.version import VERSION as __version__  # noqa: F401

__all__ = ["datasets", "modules", "toy", "transforms", "utils"]
