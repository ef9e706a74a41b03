"""`torchopt.utils`: states of modules and of optimisers, out and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import pytree
from .optim.meta import MetaOptimizer, extract_module_containers


class ModuleState(NamedTuple):
    """Parameters and buffers of a module and its submodules, a dict for each that has some."""

    params: tuple[dict[str, Tensor], ...]
    buffers: tuple[dict[str, Tensor], ...]
    visual_contents: dict | None = None
    detach_buffers: bool = False


def stop_gradient(target: ModuleState | nn.Module | MetaOptimizer | Any) -> None:
    """Cuts the tensors of a state, module, optimiser or tree off from their history, in place."""

    def detached(leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            requires_grad = leaf.requires_grad
            leaf.detach_().requires_grad_(requires_grad)

    if isinstance(target, ModuleState):
        target = target.params, target.buffers
    elif isinstance(target, nn.Module):
        target = tuple(target.parameters())
    elif isinstance(target, MetaOptimizer):
        target = target.state_dict()
    pytree.tree_map_(detached, target)


def module_detach_(target: Any) -> Any:
    """`stop_gradient`, and the target itself."""
    stop_gradient(target)
    return target


def extract_state_dict(
    target: nn.Module | MetaOptimizer,
    *,
    by: str = "reference",
    device: torch.device | str | int | None = None,
    with_buffers: bool = True,
    detach_buffers: bool = False,
    enable_visual: bool = False,
    visual_prefix: str = "",
) -> ModuleState | tuple:
    """The state of a module, or of a meta-optimiser.

    Args:
        target: a module or meta-optimiser.
        by: "reference", the tensors themselves; "copy", clones that remember them; "deepcopy", clones that do not.
        device: where the tensors are to be. Default: where they are.
        with_buffers: whether buffers of a module are taken too.
        detach_buffers: whether those are clones without history whatever `by` says.
        enable_visual, visual_prefix: names of the parameters, for TorchOpt's pictures of graphs.

    Raises:
        AssertionError: another `by`.
        RuntimeError: a target of another kind.
    """
    replicate = _replication(by, device)
    if isinstance(target, MetaOptimizer):
        return pytree.tree_map(lambda t: replicate(t) if isinstance(t, Tensor) else t, target.state_dict())
    if not isinstance(target, nn.Module):
        raise RuntimeError(f"Unexpected class of {target}")

    def replicated(containers: tuple[dict, ...], function: Callable[[Tensor], Tensor]) -> tuple[dict, ...]:
        return tuple(
            type(c)((name, function(t)) for name, t in c.items() if isinstance(t, Tensor)) for c in containers
        )

    params, buffers = extract_module_containers(target, with_buffers)
    names = None
    if enable_visual:
        named = [(visual_prefix + name, p) for name, p in target.named_parameters()]
        names = {p if p.grad_fn is None else p.grad_fn: name if p.grad_fn is None else (name, p) for name, p in named}
    for_buffers = _replication("deepcopy", device) if detach_buffers else replicate
    return ModuleState(replicated(params, replicate), replicated(buffers, for_buffers), names, detach_buffers)


def _replication(by: str, device: Any) -> Callable[[Tensor], Tensor]:
    assert by in ("reference", "copy", "deepcopy", "ref", "clone", "deepclone"), f"by must not be {by!r}"
    here = (lambda t: t) if device is None else (lambda t: t.to(device=torch.device(device)))
    if by in ("reference", "ref"):
        return here
    if by in ("copy", "clone"):
        return lambda t: here(t.clone())

    def cut_off(t: Tensor) -> Tensor:
        new = here(t.clone()).detach_()
        is_parameter = isinstance(t, nn.Parameter)
        return nn.Parameter(new, requires_grad=t.requires_grad) if is_parameter else new.requires_grad_(t.requires_grad)

    return cut_off


def recover_state_dict(target: nn.Module | MetaOptimizer, state: ModuleState | tuple) -> None:
    """Puts an extracted state back.

    The module's tensors are the state's own from then on; only buffers that were taken with `detach_buffers` are cloned
    again, so that the state can be recovered more than once.
    """
    if isinstance(target, MetaOptimizer):
        target.load_state_dict(state)
        return
    if not isinstance(target, nn.Module):
        raise RuntimeError(f"Unexpected class of {target}")
    params, buffers = extract_module_containers(target)
    new_buffers = state.buffers
    if state.detach_buffers:
        new_buffers = pytree.tree_map(_replication("deepcopy", None), new_buffers)
    for containers, news in ((params, state.params), (buffers, new_buffers)):
        for container, new in zip(containers, news, strict=False):  # a state may be without buffers
            container.update(new)


def module_clone(
    target: nn.Module | MetaOptimizer | Any,
    *,
    by: str = "reference",
    detach_buffers: bool = False,
    device: torch.device | str | int | None = None,
) -> Any:
    """A module, meta-optimiser or tree of its own with the tensors of `target`, `by` as in `extract_state_dict`."""
    replicate = _replication(by, device)
    if not isinstance(target, (nn.Module, MetaOptimizer)):
        return pytree.tree_map(replicate, target)
    tensors = extract_module_containers(target) if isinstance(target, nn.Module) else target.state_dict()
    # what deepcopy finds here it does not copy
    memo = {id(t): t for t in pytree.tree_leaves(tensors)}
    clone = copy.deepcopy(target, memo)
    recover_state_dict(clone, extract_state_dict(target, by=by, device=device, detach_buffers=detach_buffers))
    return clone
