"""Training: the loop, checkpoints, evaluation. `fastmeta train` and `fastmeta evaluate` are thin layers over
these."""

from .checkpoint import Checkpoint, CheckpointError, CheckpointFolder, load_checkpoint
from .config import RunConfig, run_config
from .evaluate import Evaluation, evaluate
from .finite import NonFiniteError
from .loop import Progress, Reporter, Trainer
from .metrics import Estimate
from .run import load

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointFolder",
    "Estimate",
    "Evaluation",
    "NonFiniteError",
    "Progress",
    "Reporter",
    "RunConfig",
    "Trainer",
    "evaluate",
    "load",
    "load_checkpoint",
    "run_config",
]
