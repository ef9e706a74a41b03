"""Gradients of a loss for every parameter of a module, as the learners take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from fastmeta.functional.second_order import differentiate

_HINT = "learn2learn: Maybe try with allow_nograd=True and/or allow_unused=True ?"


def gradients_of(
    loss: Tensor,
    parameters: Iterable[Tensor],
    *,
    create_graph: bool,
    retain_graph: bool | None = None,
    allow_unused: bool = False,
    allow_nograd: bool = False,
) -> Sequence[Tensor | None]:
    """One for each parameter: None for those without `requires_grad` under `allow_nograd`, and for those that the loss
    does not depend on under `allow_unused`.

    Raises:
        RuntimeError: one of these and not allowed; a graph wanted of a compiled loss; or what else autograd refuses.
    """
    parameters = list(parameters)
    wanted = [p for p in parameters if p.requires_grad] if allow_nograd else parameters
    retain_graph = create_graph if retain_graph is None else retain_graph
    try:
        found = differentiate(
            loss, wanted, create_graph=create_graph, retain_graph=retain_graph, allow_unused=allow_unused
        )
    except RuntimeError as error:
        if allow_nograd:
            raise
        raise RuntimeError(f"{error}\n{_HINT}") from error
    if not allow_nograd:
        return found
    left = iter(found)
    return [next(left) if p.requires_grad else None for p in parameters]
