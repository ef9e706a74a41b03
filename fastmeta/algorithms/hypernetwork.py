"""Hypernetworks: a support set goes in, the weights of a network come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta import functional, values
from fastmeta.dispatch.backends import ACTIVATIONS

from ._arguments import check_size, check_width
from ._embedding import EmbeddingLearner, squared_error
from ._targets import check_targets
from .output import MetaOutput

MODES = ("full", "head", "lowrank")


class GeneratedWeights(NamedTuple):
    """What `Hypernetwork.adapt` returns: the network of each task, as `functional_mlp` takes it. `weights[l]`
    `[T, O, I]` and `biases[l]` `[T, O]`, in the layers that the tasks share `[O, I]` and `[O]`."""

    weights: list[Tensor]
    biases: list[Tensor]


class Hypernetwork(EmbeddingLearner):
    """Support-conditioned parameter generation, `theta = g_psi(D_support)`: no gradient steps, one forward pass of a
    hypernetwork (Ha et al. 2017, "HyperNetworks") writes the weights of a multi-layer perceptron for every task, which
    `fastmeta.functional.functional_mlp` runs on the query embeddings.

    Related: Zhmoginov et al. 2022, "HyperTransformer" (weights from the support set, by a transformer where this has
    sums); Rusu et al. 2019, "LEO" (weights from the support set, then gradient steps in their latent space).

    The set encoder is a sum over examples (Zaheer et al. 2017, "Deep Sets", theorem 2), so the order of the support set
    does not matter. Classification: a perceptron on each example's embedding, the mean over each class, and again a
    perceptron and the mean over the classes; the output layer's row for a class comes from that class's summary and the
    task's, the other layers from the task's. So nothing depends on how the classes are numbered, and tasks may have
    other ways at test than in training. Regression: a perceptron on the embedding beside the target, and the mean.

    Args:
        encoder: any module from examples `[B, ...]` to embeddings `[B, D]`; `nn.Flatten()` for regression on numbers.
        features: D.
        outputs: None for classification (labels int64 `[T, S]`); for regression the target's width O
            (targets `[T, S, O]`).
        mode: which weights are generated. `"full"`: all; `"head"`: the output layer, on hidden layers that all tasks
            share; `"lowrank"`: as `"head"`, and to each hidden layer is added a generated matrix of rank `rank` and a
            generated bias.
        hidden: widths of the perceptron's hidden layers; `()` is a linear classifier on the embedding.
        activation: of the perceptron, as in `functional_mlp`.
        set_width: width of the set encoder.
        rank: of the generated matrices, only for `"lowrank"`.
        ways: the most classes `N` that a task may have; not used in regression; None, the default, sets no limit. With
            `fastmeta.check_labels(False)` the number of every task's, labelled 0 to N - 1, and nothing waits for a GPU.

    Generated weights are `shared + generated`, where the shared part starts as `nn.Linear` does and the generated part
    starts small, so that training begins with an ordinary network (as Chang et al. 2020, "Principled Weight
    Initialization for Hypernetworks", ask for: variances of the generated weights, not of the generator's).

    Departures from the papers named: the set encoder in place of recurrence or a transformer; a class's label enters by
    the class means and not as one-hot.

    Raises:
        ValueError: an unknown mode or activation, widths or a rank below 1, an encoder that does not return `[B, D]`,
            labels or targets that do not fit. TypeError: labels that are not int64, targets that are not floating.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        *,
        outputs: int | None = None,
        mode: str = "head",
        hidden: Sequence[int] = (64,),
        activation: str = "relu",
        set_width: int = 128,
        rank: int = 4,
        ways: int | None = None,
    ):
        super().__init__(encoder, ways)
        values.choice("mode", mode, MODES)
        values.choice("activation", activation, ACTIVATIONS)
        widths = {"features": features, "outputs": outputs, "set_width": set_width, "rank": rank}
        for name, value in widths.items():
            check_size(name, value, or_none=name == "outputs")
        values.counts("hidden", hidden)
        self.features, self.outputs, self.mode, self.activation = features, outputs, mode, activation
        self.hidden, self.rank = tuple(hidden), rank
        sizes = (features, *self.hidden)
        self.shared = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        # Labels reach the classification's encoder by the class means, targets a regression's beside the embedding.
        self.of_example = _perceptron(features + (outputs or 0), set_width)
        self.of_class = _perceptron(set_width, set_width) if outputs is None else None
        if outputs is None:
            # A row per class. A part shared by all classes would add the same to every logit.
            self.head = _Generator(2 * set_width, set_width, sizes[-1] + 1)
        else:
            layer = nn.Linear(sizes[-1], outputs)
            start = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach().flatten()
            self.head = _Generator(set_width, set_width, len(start), start, gain=sizes[-1] ** -0.5)
        self.layers = nn.ModuleList()
        for layer in self.shared if mode != "head" else ():
            outputs_here, inputs = layer.weight.shape
            if mode == "full":
                self.layers.append(_Generator(set_width, set_width, (inputs + 1) * outputs_here, gain=inputs**-0.5))
            else:
                numbers = rank * (inputs + outputs_here) + outputs_here
                # the product of two factors, of which there are `rank` to add up
                self.layers.append(_Generator(set_width, set_width, numbers, gain=(rank * inputs) ** -0.25))

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, outputs={self.outputs}, mode={self.mode!r}, hidden={self.hidden}, "
            f"activation={self.activation!r}, ways={self.ways}"
        )

    @property
    def _classifies(self) -> bool:
        return self.outputs is None

    def _fit(self, features: Tensor, targets: Tensor, ways: int | None) -> GeneratedWeights:
        check_width(features, self.features)
        rows, task = self._summaries(features, targets, ways)
        head = self.head(rows)
        if self.outputs is not None:
            head = head.unflatten(1, (self.outputs, -1))
        weights, biases = [], []
        for i, layer in enumerate(self.shared):
            weight, bias = layer.weight, layer.bias
            if self.mode != "head":
                weight, bias = self._generated(weight, bias, self.layers[i](task))
            weights.append(weight)
            biases.append(bias)
        return GeneratedWeights([*weights, head[..., :-1]], [*biases, head[..., -1]])

    def _summaries(self, features: Tensor, targets: Tensor, ways: int | None) -> tuple[Tensor, Tensor]:
        """What the output layer is made of, `[T, N, .]` or for regression `[T, .]`, and the others, `[T, .]`."""
        if self.outputs is not None:
            check_targets("support_y", targets, features)
            if targets.shape[2] != self.outputs:
                raise ValueError(f"support_y must have width O = {self.outputs}, got {list(targets.shape)}")
            task = self.of_example(torch.cat([features, targets.to(features.dtype)], 2)).mean(1)
            return task, task
        classes = functional.class_prototypes(self.of_example(features), targets, ways)
        task = self.of_class(classes).mean(1)
        return torch.cat([classes, task.unsqueeze(1).expand_as(classes)], 2), task

    def _generated(self, weight: Tensor, bias: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        outputs, inputs = weight.shape
        if self.mode == "full":
            matrix, shift = code.split([inputs * outputs, outputs], 1)
            return weight + matrix.unflatten(1, (outputs, inputs)), bias + shift
        left, right, shift = code.split([outputs * self.rank, self.rank * inputs, outputs], 1)
        left, right = left.unflatten(1, (outputs, self.rank)), right.unflatten(1, (self.rank, inputs))
        return weight + left @ right, bias + shift

    def _score(self, state: GeneratedWeights, features: Tensor) -> Tensor:
        return functional.functional_mlp(features, state.weights, state.biases, self.activation)

    def _num_tasks(self, state: GeneratedWeights) -> int:
        return state.weights[-1].shape[0]

    def _judge(self, logits: Tensor, query_y: Tensor) -> MetaOutput:
        return super()._judge(logits, query_y) if self.outputs is None else squared_error(logits, query_y)


class _Generator(nn.Module):
    """Numbers from a summary; what they start around, `start`, is learned too where it is given."""

    def __init__(self, inputs: int, width: int, outputs: int, start: Tensor | None = None, gain: float = 1.0):
        super().__init__()
        self.code = nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
        self.out = nn.Linear(width, outputs, bias=False)
        self.start = None if start is None else nn.Parameter(start)
        with torch.no_grad():
            self.out.weight.mul_(gain)

    def forward(self, summary: Tensor) -> Tensor:
        numbers = self.out(self.code(summary))
        return numbers if self.start is None else self.start + numbers


def _perceptron(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
