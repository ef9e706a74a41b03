"""Gradients that pass through a module for each parameter before they are a step."""

from __future__ import annotations

from torch import Tensor, nn

from .._gradients import gradients_of


class ParameterUpdate(nn.Module):
    """Called like `torch.autograd.grad`, returns for each parameter what its transform makes of the gradient.

    Args:
        parameters: the parameters that transforms are made for, in the order of later calls.
        transform: a callable from a parameter to an `nn.Module`, or to None, where the gradient itself is the update.

    Raises:
        ValueError: a transform that is neither.
    """

    def __init__(self, parameters, transform):
        super().__init__()
        modules, indices = [], []
        for p in parameters:
            made = transform(p)
            if made is not None and not isinstance(made, nn.Module):
                raise ValueError("Transform should be either a Module or None.")
            indices.append(None if made is None else len(modules))
            modules += [] if made is None else [made]
        self.transforms_modules = nn.ModuleList(modules)
        self.transforms_indices = indices

    def forward(
        self,
        loss: Tensor,
        parameters,
        create_graph: bool = False,
        retain_graph: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """The updates of `parameters`, None where there is no gradient.

        Args:
            loss: a scalar.
            parameters: as many as transforms were made for.
            create_graph, retain_graph, allow_unused: as in `torch.autograd.grad`.
            allow_nograd: whether parameters without `requires_grad` have the update None; else RuntimeError.
        """
        gradients = gradients_of(
            loss,
            parameters,
            create_graph=create_graph,
            retain_graph=create_graph if allow_nograd else retain_graph,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
        )
        pairs = zip(gradients, self.transforms_indices, strict=False)
        return [g if g is None or at is None else self.transforms_modules[at](g) for g, at in pairs]
