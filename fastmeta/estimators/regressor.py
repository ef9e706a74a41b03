"""A few-shot regressor with scikit-learn's call shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin

from ._base import FewShotEstimator, tensor
from .adapted import Adapted, learner_of


class FewShotRegressor(RegressorMixin, FewShotEstimator):
    """A function from a few of its points, by a learner that was trained on other functions, or by ridge regression.

    `fit` is the learner's `adapt` on one task, the support set; nothing is trained. A scikit-learn regressor.

    Args:
        learner: what predicts: the folder of a run of `fastmeta train` on regression, or one of its checkpoints; a
            module with `adapt` and `predict`, as those of `fastmeta.algorithms`; or `"ridge"` (None, the default, is
            this): ridge regression, penalty 1, with an intercept, in float64. Standardise a table's columns before.
        device, chunk_size: as of `FewShotClassifier`.

    Rows are what `FewShotClassifier` takes; targets `[n]` or `[n, O]`, predictions alike.

    Attributes:
        n_features_in_: numbers of an example.
        adapted_: the learner and its state (`~fastmeta.estimators.Adapted`).

    Raises:
        ValueError: rows and targets that do not fit each other or the run. CheckpointError: a folder without a run.
        TypeError: a learner that is none.
    """

    def __init__(self, learner: Any = None, *, device: str | None = None, chunk_size: int = 1024):
        self.learner = learner
        self.device = device
        self.chunk_size = chunk_size

    def fit(self, X: Any, y: Any) -> FewShotRegressor:
        """Adapt to the support set: rows `[n, ...]` and their targets `[n]` or `[n, O]`."""
        X, y = self._checked(X, y, multi_output=True, y_numeric=True)
        self.single_ = y.ndim == 1
        targets = tensor(np.asarray(y, np.float64)).view(len(y), -1)
        learner = learner_of("ridge" if self.learner is None else self.learner, "regression", self.device)
        self._check_names(learner)
        self.adapted_ = Adapted(learner, tensor(X), targets, chunk_size=self.chunk_size)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predictions `[n]` or `[n, O]` of rows `[n, ...]`, float64."""
        query = self._query(X)
        found = self.adapted_.predict(query).numpy()
        return found[:, 0] if self.single_ else found

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
