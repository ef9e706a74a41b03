"""What both estimators share: rows of any kind as scikit-learn checks them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from ..tasks.read import Features
from .adapted import as_host


class FewShotEstimator(BaseEstimator):
    """Rows in, on their way to `Adapted`."""

    def _checked(self, x: Any, *y: Any, **options: Any) -> Any:
        """Rows as an array `[n, ...]` that scikit-learn finds in order; in `fit`, where there are targets `y`, both."""
        x = _as_array(x)
        options |= {"dtype": "numeric", "allow_nd": True, "ensure_2d": getattr(x, "ndim", 2) <= 2}
        found = validate_data(self, x, *map(as_host, y), reset=bool(y), **options)
        rows = found[0] if y else found
        if y:
            self.shape_ = rows.shape[1:]
            self.n_features_in_ = int(np.prod(self.shape_))
        elif rows.shape[1:] != self.shape_:
            raise ValueError(f"X must be [n, {', '.join(map(str, self.shape_))}] as in fit, got {list(rows.shape)}")
        return found

    def _check_names(self, learner: nn.Module) -> None:
        """The columns of a data frame must be those of the table that a run was trained on: numbers have no names."""
        table = getattr(getattr(learner, "inputs", None), "table", None)
        if table is None or not hasattr(self, "feature_names_in_"):
            return
        given, trained = tuple(self.feature_names_in_), Features.from_json(table["features"]).names
        if given != trained:
            raise ValueError(
                f"columns of X must be those of the run's table, {', '.join(trained)}, in this order; got "
                f"{', '.join(given)}"
            )

    def _query(self, x: Any) -> Tensor:
        check_is_fitted(self)
        return tensor(self._checked(x))

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "adapted_")


def tensor(x: np.ndarray) -> Tensor:
    """An array's own memory where it may be written to, as torch wants it."""
    return torch.from_numpy(x if x.flags.writeable else x.copy())


def _as_array(x: Any) -> Any:
    """Tensors, and lists of them, of arrays or of pictures, as one array; anything else as it is."""
    if not isinstance(x, (list, tuple)) or not x:
        return as_host(x)
    parts = [np.asarray(as_host(one)) for one in x]
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"X must be examples of one shape, got {', '.join(map(str, sorted(shapes)[:3]))}")
    return np.stack(parts)
