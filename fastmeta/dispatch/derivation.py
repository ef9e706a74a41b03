"""What follows from an op's reference: its gradient by plain autograd, and the op `<name>_bwd`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmeta.dispatch.arguments import as_list, flat_outputs, is_list
from fastmeta.dispatch.spec import Args, OpSpec


def vjp_of_reference(spec: OpSpec):
    """A `backward` that differentiates the reference: plain torch, hence differentiable to any order."""

    def backward(args: Args, grads, needs: int):
        wanted = [position for bit, position in enumerate(spec.differentiable_positions) if needs >> bit & 1]
        inputs = [tensor for position in wanted for tensor in as_list(args[position])]

        def function(*tensors):
            it = iter(tensors)
            full = list(args)
            for position in wanted:
                full[position] = [next(it) for _ in args[position]] if is_list(args[position]) else next(it)
            outputs = spec.reference(*full)
            return tuple(flat_outputs(outputs)[: spec.differentiable_outputs])

        flat_grads = flat_outputs(grads)[: spec.differentiable_outputs]
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            outputs, pull = torch.func.vjp(function, *inputs)
            results = pull(tuple(_like(grad, output) for grad, output in zip(flat_grads, outputs, strict=True)))
        else:  # plain autograd is the cheaper way, and goes where a dispatch mode looks on
            further = torch.is_grad_enabled()  # else nothing will be differentiated again
            with torch.enable_grad():
                # each a tensor of its own, though the same may stand in two places
                inputs = [
                    t.view_as(t) if further and t.requires_grad else t.detach().requires_grad_() for t in inputs
                ]
                outputs = function(*inputs)
            if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradCPU):
                raise AssertionError(f"{spec.name}: differentiated where autograd is switched off by key")
            live = [
                (output, _like(grad, output))
                for grad, output in zip(flat_grads, outputs, strict=True)
                if output.requires_grad
            ]
            results = [None] * len(inputs)
            if live:
                ends, pulled = zip(*live, strict=True)
                results = torch.autograd.grad(ends, inputs, pulled, create_graph=further, allow_unused=True)
        found = iter(results)
        gradients = []
        for bit, position in enumerate(spec.differentiable_positions):
            needed = bool(needs >> bit & 1)
            values = [
                _or_zeros(next(found), tensor) if needed else tensor.new_empty(0) for tensor in as_list(args[position])
            ]
            gradients.append(values if is_list(args[position]) else values[0])
        return tuple(gradients)

    return backward


def derive_backward(spec: OpSpec) -> dict:
    """The parts of the op `<name>_bwd` that follow from `spec`: its reference is the vjp of the forward's reference.

    Its arguments are the gradients of the differentiable outputs, the forward's arguments, and `needs`; its outputs
    the gradients of the differentiable arguments, of size 0 where `needs` has no bit for them.
    """
    returns = [kind.strip() for kind in spec.returns.strip("()").split(",")][: spec.differentiable_outputs]
    grads = [f"grad_{i}" if len(returns) > 1 else "grad" for i in range(len(returns))]
    types = dict(zip(spec.argument_names, spec.argument_types, strict=True))
    count = len(grads)
    needs_name = "needs" if "needs" not in types else "second_needs"  # the gradient of a gradient has both
    pull = vjp_of_reference(spec)

    def unpack(outputs):
        return outputs[0] if len(outputs) == 1 else outputs

    def reference(*args):
        return unpack(pull(args[count:-1], args[:count], args[-1]))

    def fake(*args):
        inputs, needs = args[count:-1], args[-1]
        gradients = []
        for bit, position in enumerate(spec.differentiable_positions):
            values = [
                torch.empty_like(t, memory_format=torch.contiguous_format) if needs >> bit & 1 else t.new_empty(0)
                for t in as_list(inputs[position])
            ]
            gradients.append(values if is_list(inputs[position]) else values[0])
        return unpack(tuple(gradients))

    outputs = ", ".join(types[name] for name in spec.differentiable)
    return {
        "name": f"{spec.name}_bwd",
        "arguments": ", ".join(
            [f"{kind} {name}" for kind, name in zip(returns, grads, strict=True)]
            + [spec.arguments, f"int {needs_name}"]
        ),
        "returns": f"({outputs})" if len(spec.differentiable) > 1 else outputs,
        "summary": f"gradient of `{spec.name}`",
        "reference": reference,
        "fake": fake,
        "differentiable": (*grads, *spec.differentiable),
        "gradient_of": spec.differentiable,
        "consistent": spec.consistent
        and (lambda *args: (*args[:count], *spec.consistent(*args[count:-1]), args[-1])),
        "check": None,
        "autocast": spec.autocast,
    }


def _like(grad: Tensor | None, output: Tensor) -> Tensor:
    return torch.zeros_like(output) if grad is None else grad.expand_as(output)


def _or_zeros(grad: Tensor | None, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if grad is None else grad
