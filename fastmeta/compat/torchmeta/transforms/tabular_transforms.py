"""Transforms of rows of tables."""

import numpy as np
import torch
from torch import Tensor


class NumpyToTorch:
    """An array as a tensor."""

    def __call__(self, numpy_array: np.ndarray) -> Tensor:
        return torch.from_numpy(numpy_array).contiguous()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
