"""Gradient descent as the head: a linear layer that starts at zero and is fitted to each support set in a few steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta import functional, values
from fastmeta.functional.fast_weights import MLPFastWeights

from ._arguments import check_count, check_number
from ._embedding import EmbeddingLearner
from .output import MetaOutput, classified


class GradientHead(EmbeddingLearner):
    """ANIL (Raghu et al. 2020, section 4) whose head starts at zero, so that a task may have any number of classes.

    The inner loop takes `inner_steps` steps of gradient descent on the support cross-entropy of a linear layer without
    bias, from zero, in the fused inner loops; the outer loop trains the encoder and the inner rate on the query loss,
    second derivatives included. A head at zero is the zeroing trick of Kao et al. 2022 ("MAML is a Noisy Contrastive
    Learner in Classification"); one vector learned for all classes, as in Ye and Chao 2022 ("How to Train Your MAML to
    Excel in Few-Shot Classification"), adds the same number to the logits of all classes: the same head.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]`.
        inner_lr: where the inner rate starts, 10 by default; learned by its logarithm. The rate is that of one class's
            examples: the gradient of the mean over the support set is multiplied by N, so that what was learned with
            many classes holds for few.
        inner_steps: `K >= 0`, 1 by default. May be set anew between calls.
        normalise: whether embeddings are brought to unit length, default True.
        first_order: drop the second derivatives.
        ways: the most classes `N` that a task may have; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

    Departures from ANIL: the start at zero, the learned rate and its factor N, unit length, no bias.

    Raises:
        ValueError: arguments out of range, an encoder that does not return `[B, D]`, labels that do not fit.
        TypeError: labels that are not int64.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        inner_lr: float = 10.0,
        inner_steps: int = 1,
        normalise: bool = True,
        first_order: bool = False,
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        self.inner_steps = check_count("inner_steps", inner_steps, 0)
        self.log_inner_lr = nn.Parameter(torch.tensor(check_number("inner_lr", inner_lr, 0.0, open=True)).log())
        self.normalise = values.flag("normalise", normalise)
        self.first_order = values.flag("first_order", first_order)

    def extra_repr(self) -> str:
        return f"inner_steps={self.inner_steps}, normalise={self.normalise}, first_order={self.first_order}"

    def _encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        features = super()._encode(x, mask)
        return F.normalize(features, dim=-1) if self.normalise else features

    def _inner_loop(self, features: Tensor, ways: int):
        """The head, `[N, D]`, and the other arguments of the loop."""
        rate = ways * self.log_inner_lr.exp()
        return [features.new_zeros(ways, features.shape[2])], {
            "lr": rate, "steps": self.inner_steps, "first_order": self.first_order,
        }  # fmt: skip

    def _fit(self, features: Tensor, targets: Tensor, ways: int) -> MLPFastWeights:
        head, options = self._inner_loop(features, ways)
        return functional.adapt_mlp(features, targets, head, None, **options)

    def _score(self, state: MLPFastWeights, features: Tensor) -> Tensor:
        return functional.functional_mlp(features, state)

    def _num_tasks(self, state: MLPFastWeights) -> int:
        if not isinstance(state, MLPFastWeights):
            raise TypeError  # lists have a length too
        return len(state)

    def _tasks(self, support: Tensor, support_y: Tensor, query: Tensor, query_y: Tensor, ways: int) -> MetaOutput:
        head, options = self._inner_loop(support, ways)
        found = functional.meta_loss_mlp(support, support_y, query, query_y, head, None, **options)
        return classified(found.loss, found.logits, query_y)
