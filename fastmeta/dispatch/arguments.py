"""Arguments of an op, which are tensors, lists of them and plain values, taken apart and put together."""

from __future__ import annotations

from torch import Tensor

from fastmeta.dispatch.spec import Args, OpSpec


class Structure:
    """The arguments without their tensors: opaque to pytree, so that `torch.func` hands it through untouched."""

    def __init__(self, spec: OpSpec, args: Args):
        self.places = spec.tensor_arguments
        self.rest = list(args)  # and of a list of tensors its length
        for position, _, many in self.places:
            self.rest[position] = len(args[position]) if many else None
        self.lengths: tuple | None = None  # how the outputs were nested

    def join(self, tensors) -> Args:
        args, it = self.rest.copy(), iter(tensors)
        for position, _, many in self.places:
            args[position] = [next(it) for _ in range(args[position])] if many else next(it)
        return tuple(args)

    def split_outputs(self, outputs) -> tuple[Tensor, ...]:
        single = not isinstance(outputs, tuple)  # one Tensor, or one Tensor[]
        nested = (outputs,) if single else outputs
        self.lengths = (single, tuple([len(o) if is_list(o) else None for o in nested]))
        return tuple(flat_outputs(outputs))

    def nest(self, flat) -> tuple:
        it = iter(flat)
        return tuple([next(it) if n is None else [next(it) for _ in range(n)] for n in self.lengths[1]])

    def join_outputs(self, flat):
        nested = self.nest(flat)
        return nested[0] if self.lengths[0] else nested


def lifted(spec: OpSpec, args: Args) -> Args:
    """The arguments with the task dimension that shared tensors may come without."""
    if not spec.ranks:
        return args
    lifted = list(args)
    for position, rank in spec.rank_by_position:
        lifted[position] = [t if t.dim() == rank else t.unsqueeze(0) for t in args[position]]
    return tuple(lifted)


def save(ctx, spec: OpSpec, args: Args) -> None:
    ctx.save_for_backward(*tensors_of(args))
    ctx.structure = Structure(spec, args)


def saved(ctx) -> Args:
    return ctx.structure.join(ctx.saved_tensors)


def is_list(value) -> bool:
    return isinstance(value, (list, tuple))


def as_list(value) -> list:
    return list(value) if is_list(value) else [value]


def tensors_of(args: Args) -> list[Tensor]:
    tensors: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
        elif isinstance(arg, (list, tuple)):
            tensors.extend(arg)
    return tensors


def flat_outputs(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for output in outputs for t in as_list(output)]
