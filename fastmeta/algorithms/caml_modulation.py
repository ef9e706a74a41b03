"""CAML as conditional modulation: a metric space of the classes shifts and scales the features of a second network.

Two papers bear the name CAML. This is the one of 2019; that of 2024 is in `caml_incontext`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta import functional
from fastmeta.dispatch.backends import METRICS
from fastmeta.functional import checks

from ._embedding import EmbeddingLearner, check_labels, judged
from .output import MetaOutput


class ModulatedPrototypes(NamedTuple):
    """What `ModulationCAML.adapt` returns: the class means in the metric space, `[T, N, D]`, which modulate, and those
    of the modulated features, `[T, N, F]`, which classify."""

    metric: Tensor
    prototypes: Tensor


class ModulationCAML(EmbeddingLearner):
    """Conditional class-aware meta-learning (Jiang et al. 2019, "Learning to Learn with Conditional Class
    Dependencies", section 3).

    A metric space, trained as a prototypical network, knows which classes are alike. Where an example lies in it, and
    among which class means of its task, conditions the base network that classifies: every normalised feature map
    becomes `(1 + gamma) * map + beta`, with `gamma` and `beta` computed from the condition (their conditionally
    transformed block). Here the condition of an example is `[f(x), sum_n a_n c_n]`: its embedding `f(x)` and the mean
    of the class means `c_n`, weighted by `a = softmax(-distance(f(x), c))`; support and query are treated alike.

    Departures: the base network classifies by the means of its modulated support features, where the paper adapts it
    by gradient steps as MAML does, so there is no inner loop; the condition holds the task's class means; the metric
    space is trained together with the rest, by `metric_weight` times its own loss, where the paper trains it first. The
    loss of the metric space is added in train mode only.

    Args:
        encoder: the metric space `f`: any module from examples `[B, ...]` to embeddings `[B, D]`.
        base: a module from examples `[B, ...]` and conditions `[B, 2 D]` to features `[B, F]`: `FiLMConv4` for images,
            `FiLMMLP` for vectors, or your own.
        metric_weight: of the metric space's loss, 0.5.
        metric: of both spaces, as in `fastmeta.functional.pairwise_distance`.
        ways: the number of classes `N` of every task. None takes the largest support label of the batch plus one, which
            on a GPU waits for the device; give it in training loops there.

    A class without support examples has its means at zero.

    Raises:
        ValueError: an unknown metric, a negative weight, an encoder or base that does not return `[B, D]`, labels that
            do not fit. TypeError: labels that are not int64.
    """

    def __init__(
        self,
        encoder: nn.Module,
        base: nn.Module,
        *,
        metric_weight: float = 0.5,
        metric: str = "sqeuclidean",
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        checks.choice("metric", metric, METRICS)
        if not metric_weight >= 0:
            raise ValueError(f"metric_weight must be at least 0, got {metric_weight!r}")
        self.base, self.metric, self.metric_weight = base, metric, metric_weight

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, metric_weight={self.metric_weight}, ways={self.ways}"

    def adapt(self, support_x: Tensor, support_y: Tensor) -> ModulatedPrototypes:
        """Class means in both spaces of support sets `[T, S, ...]` with labels int64 `[T, S]`."""
        embeddings = self._encode("support_x", support_x)
        num_classes = self._num_classes(support_y, embeddings)
        means = functional.class_prototypes(embeddings, support_y, num_classes)
        features = self._modulated(support_x, self._condition(embeddings, means))
        return ModulatedPrototypes(means, functional.class_prototypes(features, support_y, num_classes))

    def predict(self, state: ModulatedPrototypes, query_x: Tensor) -> Tensor:
        """Logits `[T, Q, N]`: minus the distance of the modulated features to each class mean."""
        embeddings = self._encode("query_x", query_x)
        if len(state.metric) != len(embeddings):
            raise ValueError(f"query_x has {len(embeddings)} tasks, state has {len(state.metric)}")
        features = self._modulated(query_x, self._condition(embeddings, state.metric))
        return -functional.pairwise_distance(features, state.prototypes, self.metric)

    def forward(self, batch) -> MetaOutput:
        """Mean cross entropy of the query sets, in train mode with that of the metric space; each network runs once."""
        support_x, support_y, query_x, query_y = batch
        self._check_examples(support_x, query_x)
        x = torch.cat([support_x, query_x], 1)
        sizes = [support_x.shape[1], query_x.shape[1]]
        embeddings = self._encode("support_x", x)
        support, query = embeddings.split(sizes, 1)
        num_classes = self._num_classes(support_y, support)
        means = functional.class_prototypes(support, support_y, num_classes)
        modulated_support, modulated_query = self._modulated(x, self._condition(embeddings, means)).split(sizes, 1)
        prototypes = functional.class_prototypes(modulated_support, support_y, num_classes)
        logits = -functional.pairwise_distance(modulated_query, prototypes, self.metric)
        check_labels("query_y", query_y, logits, num_classes)
        task_loss = F.cross_entropy(logits.transpose(1, 2), query_y, reduction="none").mean(1)
        if self.training and self.metric_weight:
            distance = functional.pairwise_distance(query, means, self.metric)
            metric_loss = F.cross_entropy(-distance.transpose(1, 2), query_y, reduction="none").mean(1)
            task_loss = task_loss + self.metric_weight * metric_loss
        return judged(task_loss, logits, query_y)

    def _condition(self, embeddings: Tensor, means: Tensor) -> Tensor:
        """`[T, B, 2 D]`: where the rows lie, and near which of the task's classes."""
        near = torch.softmax(-functional.pairwise_distance(embeddings, means, self.metric), -1)
        return torch.cat([embeddings, near @ means], 2)

    def _modulated(self, x: Tensor, condition: Tensor) -> Tensor:
        features = self.base(x.flatten(0, 1), condition.flatten(0, 1))
        if features.dim() != 2:
            raise ValueError(f"base must return features [B, F], got shape {tuple(features.shape)}")
        return features.unflatten(0, x.shape[:2])


class FiLM(nn.Module):
    """`(1 + gamma) * x + beta`, with `gamma` and `beta` for each channel of each row from the row's condition, by a
    perceptron with one hidden layer (Perez et al. 2018, "FiLM", equation 1, around 1 as their section 2.2 has it).

    Args: condition: width of the condition. channels: of `x` `[B, channels, ...]`. hidden: of the perceptron.
    """

    def __init__(self, condition: int, channels: int, hidden: int = 32):
        super().__init__()
        self.code = nn.Sequential(nn.Linear(condition, hidden), nn.ReLU(), nn.Linear(hidden, 2 * channels))
        with torch.no_grad():
            self.code[2].weight.mul_(0.1)  # begins near the network without modulation

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.code(condition).unflatten(1, (2, -1, *(1 for _ in range(x.dim() - 2)))).unbind(1)
        return torch.addcmul(beta, 1 + gamma, x)


class FiLMConv4(nn.Module):
    """`fastmeta.nn.conv4` with each batch norm modulated: images `[B, C, H, W]` and conditions `[B, condition]` to
    features `[B, F]`; 28x28 images give F = `hidden`.

    Args: condition: width of the condition, `2 D` for `ModulationCAML`. in_channels: of the images. hidden: channels of
        every block.
    """

    def __init__(self, condition: int, in_channels: int = 1, hidden: int = 64):
        super().__init__()
        widths = (in_channels, hidden, hidden, hidden)
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, hidden, 3, padding=1) for channels in widths)
        # gamma and beta take the place of the norm's own scale and shift
        self.norms = nn.ModuleList(nn.BatchNorm2d(hidden, affine=False) for _ in widths)
        self.films = nn.ModuleList(FiLM(condition, hidden) for _ in widths)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for convolution, norm, film in zip(self.convolutions, self.norms, self.films, strict=True):
            x = F.max_pool2d(film(norm(convolution(x)), condition), 2).relu()
        return x.flatten(1)


class FiLMMLP(nn.Module):
    """A perceptron whose hidden layers are modulated before their ReLU: `[B, ...]` and `[B, condition]` -> `[B, F]`.

    Args: condition: width of the condition, `2 D` for `ModulationCAML`. sizes: widths, those of input and output
        included, at least three.
    """

    def __init__(self, condition: int, sizes):
        super().__init__()
        if len(sizes) < 3:
            raise ValueError(f"sizes must hold an input, hidden and output widths, got {list(sizes)}")
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        self.films = nn.ModuleList(FiLM(condition, width) for width in sizes[1:-1])

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer, film in zip(self.layers[:-1], self.films, strict=True):
            x = film(layer(x), condition).relu()
        return self.layers[-1](x)
