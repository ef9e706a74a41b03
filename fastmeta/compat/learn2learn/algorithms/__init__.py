"""The learners: `MAML`, `MetaSGD`, `GBML`, and the updates that they make."""

from fastmeta.compat._absent import not_here

from .base_learner import BaseLearner
from .gbml import GBML
from .maml import MAML, maml_update
from .meta_sgd import MetaSGD, meta_sgd_update

__all__ = ["GBML", "MAML", "BaseLearner", "MetaSGD", "maml_update", "meta_sgd_update"]

__getattr__ = not_here(
    __name__,
    "learn2learn 0.2.0",
    (
        "LightningANIL",
        "LightningEpisodicModule",
        "LightningMAML",
        "LightningMetaOptNet",
        "LightningPrototypicalNetworks",
        "lightning",
    ),
)
