"""learn2learn 0.2.0's names on current PyTorch, in plain Python: change the import, keep the code.

    from fastmeta.compat import learn2learn as l2l

What is here: `algorithms` (`MAML`, `MetaSGD`, `GBML`), `optim`, `nn`, `utils`, `data`, and of `vision` Omniglot, the
networks, and the tasksets. The numbers are learn2learn's, for the same weights and the same seed of
Python's `random`. What is not: `gym`, `text`, the learners for Lightning, the data sets that are downloaded from
elsewhere. Each module says where it differs.

Beside learn2learn's: `adapt_batch`, which runs a loop over tasks as one call, and `data.stack_tasks` and
`Taskset.sample_batch`, which make it its batch.
"""

from fastmeta.compat._absent import not_here

from . import algorithms, data, nn, optim, vision
from ._batched import adapt_batch
from .utils import (
    accuracy,
    clone_distribution,
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_distribution,
    detach_module,
    flatten_config,
    magic_box,
    update_module,
    warn_once,
)

__version__ = "0.2.0"

__all__ = [
    "accuracy",
    "adapt_batch",
    "algorithms",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "data",
    "detach_distribution",
    "detach_module",
    "flatten_config",
    "magic_box",
    "nn",
    "optim",
    "update_module",
    "vision",
    "warn_once",
]

__getattr__ = not_here(__name__, "learn2learn 0.2.0", ("gym", "text"))
