"""Inner steps, prototypes, matching, ridge regression, the hardness of episodes; and `data`."""

from fastmeta.compat.torchmeta.utils import data
from fastmeta.compat.torchmeta.utils.gradient_based import gradient_update_parameters, task_parameters
from fastmeta.compat.torchmeta.utils.matching import (
    matching_log_probas,
    matching_loss,
    matching_probas,
    pairwise_cosine_similarity,
)
from fastmeta.compat.torchmeta.utils.metrics import hardness_metric
from fastmeta.compat.torchmeta.utils.prototype import get_num_samples, get_prototypes, prototypical_loss
from fastmeta.compat.torchmeta.utils.r2d2 import ridge_regression

__all__ = [
    "data",
    "get_num_samples",
    "get_prototypes",
    "gradient_update_parameters",
    "hardness_metric",
    "matching_log_probas",
    "matching_loss",
    "matching_probas",
    "pairwise_cosine_similarity",
    "prototypical_loss",
    "ridge_regression",
    "task_parameters",
]
