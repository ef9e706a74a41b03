"""Maximum-entropy inverse reinforcement learning as a loss over rows of states, for any algorithm with an inner loop.

Demonstrations are modelled as drawn from `p(tau) = exp(R(tau)) / Z`, `R(tau) = sum over its states of r(state)`
(Ziebart et al. 2008, equation 4). `Z` is estimated from M trajectories drawn from a proposal `q` (Finn, Levine and
Abbeel 2016, "Guided Cost Learning", equation 2):

    loss = mean over demonstrations of  -R(demonstration) + log( 1/M sum_j exp(R(tau_j)) / q(tau_j) )

whose gradient is the expected difference of state visits, demonstrator less model. Rows and targets of a task are an
ordinary `TaskBatch`. In continuous worlds the rows are the states of each demonstration and of the M trajectories
that start where it does, and targets carry `log q` (`MaxEntLoss`); where states are few, the rows are the states
themselves, and targets say how often each trajectory was there (`TabularMaxEntLoss`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta import values


class MaxEntLoss:
    """The loss of one task, to hand to `MAML(loss=...)` and its kin.

    Args:
        samples: M, trajectories per demonstration that estimate the partition function.
        horizon: H, states per trajectory.

    Called with rewards `[S, 1]` and targets `[S, 1]`, `S = demonstrations * (1 + M) * H`: for each demonstration its
    own states and then those of its samples (`rows`). A target is its trajectory's `log q / H`, 0 for demonstrations.
    """

    in_kernels = "maximum_entropy"

    def __init__(self, samples: int, horizon: int):
        self.samples, self.horizon = values.count("samples", samples), values.count("horizon", horizon)

    def __call__(self, rewards: Tensor, targets: Tensor) -> Tensor:
        _check_pair(rewards, targets)
        each = (1 + self.samples) * self.horizon
        if rewards.shape != targets.shape or rewards.shape[1] != 1 or len(rewards) % each:
            raise ValueError(
                f"rewards and targets must have shape [S, 1], S a multiple of (1 + samples) horizon = {each}, got "
                f"{list(rewards.shape)} and {list(targets.shape)}"
            )
        return _loss((rewards - targets).reshape(-1, 1 + self.samples, self.horizon).sum(2))

    def kernel_targets(self, targets: Tensor) -> Tensor:
        """All tasks' targets `[T, S, 1]` as the fused inner loops take them, `[T, d, 1 + M]`."""
        return targets.reshape(targets.shape[0], -1, 1 + self.samples, self.horizon).sum(3)

    def __repr__(self) -> str:
        return f"MaxEntLoss(samples={self.samples}, horizon={self.horizon})"


class TabularMaxEntLoss:
    """The same for few states, with `samples` = M.

    Called with rewards `[S + 1, 1]` and targets `[S + 1, d (1 + M)]`: visits of the S states by each demonstration and
    its samples, and in a last row, whose reward means nothing, their `log q` (`visits`).
    """

    in_kernels = "maximum_entropy"

    def __init__(self, samples: int):
        self.samples = values.count("samples", samples)

    def __call__(self, rewards: Tensor, targets: Tensor) -> Tensor:
        _check_pair(rewards, targets)
        each = 1 + self.samples
        if rewards.shape != (len(targets), 1) or not len(targets) or targets.shape[1] % each:
            raise ValueError(
                f"rewards and targets must have shape [S + 1, 1] and [S + 1, d (1 + samples)], 1 + samples = {each}, "
                f"got {list(rewards.shape)} and {list(targets.shape)}"
            )
        returns = (rewards[:-1] * targets[:-1]).sum(0) - targets[-1]
        return _loss(returns.reshape(-1, 1 + self.samples))

    def kernel_targets(self, targets: Tensor) -> Tensor:
        """All tasks' targets `[T, S + 1, d (1 + M)]` as the fused inner loops take them, `[T, S + 1, d, 1 + M]`."""
        return targets.unflatten(2, (-1, 1 + self.samples))

    def __repr__(self) -> str:
        return f"TabularMaxEntLoss(samples={self.samples})"


def _check_pair(rewards: Tensor, targets: Tensor) -> None:
    for name, value in (("rewards", rewards), ("targets", targets)):
        values.tensor(name, value)
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {values.dtype_of(value)}")
        if value.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got {list(value.shape)}")
    if rewards.device != targets.device:
        raise ValueError(f"rewards are on {rewards.device}, but targets on {targets.device}: they must agree")


def _loss(weighted: Tensor) -> Tensor:
    """From returns less log q, `[d, 1 + M]`, the demonstration first."""
    log_partition = torch.logsumexp(weighted[:, 1:], 1) - math.log(weighted.shape[1] - 1)
    return (log_partition - weighted[:, 0]).mean()


def visits(states: int, demonstrations: Tensor, samples: Tensor, log_q: Tensor) -> Tensor:
    """Targets `[T, states + 1, d (1 + M)]` from the states of demonstrations `[T, d, H]` and samples `[T, d, M, H]`,
    int64, and their log-probabilities `[T, d, M]`."""
    reached = torch.cat([demonstrations.unsqueeze(2), samples], 2)  # [T, d, 1 + M, H]
    counts = log_q.new_zeros(*reached.shape[:3], states)
    counts.scatter_add_(3, reached, torch.ones_like(reached, dtype=log_q.dtype))
    all_log_q = torch.cat([log_q.new_zeros(*log_q.shape[:2], 1), log_q], 2)
    return torch.cat([counts, all_log_q.unsqueeze(3)], 3).flatten(1, 2).transpose(1, 2)


def rows(demonstrations: Tensor, samples: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs `[T, S, F]` and targets `[T, S, 1]` from demonstrations `[T, d, H, F]`, samples `[T, d, M, H, F]` and
    their log-probabilities `[T, d, M]`."""
    x = torch.cat([demonstrations.unsqueeze(2), samples], 2)  # [T, d, 1 + M, H, F]
    share = torch.cat([log_q.new_zeros(*log_q.shape[:2], 1), log_q], 2) / x.shape[3]
    y = share[..., None, None].expand(*x.shape[:4], 1)
    return x.flatten(1, 3), y.flatten(1, 3)
