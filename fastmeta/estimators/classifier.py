"""A few-shot classifier with scikit-learn's call shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from ._base import FewShotEstimator, tensor
from .adapted import Adapted, learner_of


class FewShotClassifier(ClassifierMixin, FewShotEstimator):
    """Classes from a few examples each, by a learner that was trained on other classes, or by a rule without training.

    `fit` is the learner's `adapt` on one task, the support set; nothing is trained. A scikit-learn classifier:
    pipelines, `clone`, grid search, pickle.

    Args:
        learner: what classifies:

            - the folder of a run of `fastmeta train`, or one of its checkpoints (see `fastmeta.load`);
            - a module with `adapt` and `predict`, as those of `fastmeta.algorithms`; it is copied in `fit`;
            - `"nearest-mean"` (the class with the nearest mean; None, the default, is this), `"nearest"` (the class of
              the nearest example), `"ridge"` (ridge regression on the classes, penalty 1; ten times its predictions,
              which lie around 0 and 1, are the logits, as `RidgeHead` starts), `"in-context"` (attention over the
              support rows, by ten times the cosine, as in matching networks): rules on the flattened rows less the mean
              of the support rows, in float64. Standardise a table's columns before.
        calibrate: fit a temperature that the logits are divided by before their softmax (Guo et al. 2017, section 4.2)
            to predictions of each support row from the others. 1 where a class has one row: without it there is no such
            class. Takes as many adaptations as there are support rows, at most 128; they run as one batch of tasks.
        device: where the learner runs: "auto", "cpu", "cuda" or "cuda:N"; None (default) leaves a module where it is,
            takes a GPU for a run where there is one, and the CPU for rules.
        chunk_size: rows of a prediction that go through the learner at a time, which bounds memory; 1024 by default.
            A net with batch norms that have no running statistics (`conv4` in MAML) sees each row beside the support
            set alone, so that its prediction does not depend on the others.

    `fit`, `predict`, `predict_proba` and `score` take rows `[n, ...]` as NumPy arrays, tensors, data frames of numbers,
    or lists of examples or pictures; uint8 counts from 0 to 255 as 0 to 1. A run on images reads `[n, C, H, W]`,
    `[n, H, W, C]`, grey ones `[n, H, W]`, and any example flattened, `[n, D]`, of the size that it was trained on. A
    module is given what you give, `[n, H, W, C]` in uint8 turned to channels first. Labels are of any type that
    scikit-learn knows: strings, whole numbers, booleans.

    Attributes:
        classes_: the labels in sorted order; columns of `predict_proba`.
        n_features_in_: numbers of an example.
        adapted_: the learner and its state (`~fastmeta.estimators.Adapted`), with `temperature`.

    Raises:
        ValueError: rows and labels that do not fit each other or the run; a data frame whose columns are not those of
            the run's table, in their order; a number of classes that the run's last layer does not have.
        CheckpointError: a folder without a run. TypeError: a learner that is none.
    """

    def __init__(self, learner: Any = None, *, calibrate: bool = False, device: str | None = None,
                 chunk_size: int = 1024):  # fmt: skip
        self.learner = learner
        self.calibrate = calibrate
        self.device = device
        self.chunk_size = chunk_size

    def fit(self, X: Any, y: Any) -> FewShotClassifier:
        """Adapt to the support set: rows `[n, ...]` and their labels `[n]`."""
        X, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        learner = learner_of("nearest-mean" if self.learner is None else self.learner, "classification", self.device)
        self._check_names(learner)
        options = {"calibrate": self.calibrate, "chunk_size": self.chunk_size}
        self.adapted_ = Adapted(learner, tensor(X), torch.from_numpy(numbers), **options)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The labels `[n]` of rows `[n, ...]`."""
        query = self._query(X)
        return self.classes_[self.adapted_.predict(query).argmax(1).numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, float64 `[n, N]`, columns as in `classes_`."""
        query = self._query(X)
        return self.adapted_.probabilities(query).numpy()
