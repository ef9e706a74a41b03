"""How a training step finds the meta-gradient: in which precision, compiled, or replayed as one CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..algorithms import MetaOutput
from ..algorithms._auto_chunk import State
from ..batch import TaskBatch
from ..engines import _memory as memory
from ..functional.capture import capture as captured

AUTOCAST = {"bf16": torch.bfloat16}


class MetaGradient:
    """Called with a task batch it leaves the meta-gradient in the parameters' `grad`, and returns the output.

    Args:
        algorithm: the learner; module: what is called for the loss, the algorithm or what wraps it.
        loss_of: from an output to what the gradient is taken of.
        autocast: "bf16", or None for the parameters' own precision.
        compile: call the algorithm through `torch.compile`.
        capture: record the step's forward and backward as a CUDA graph (`fastmeta.capture`).

    What cannot be used is left out, and `told_now` says so once.
    """

    def __init__(
        self,
        algorithm: nn.Module,
        module: nn.Module,
        loss_of: Callable[[MetaOutput], Tensor],
        *,
        autocast: str | None = None,
        compile: bool = False,
        capture: bool = False,
    ):
        self._algorithm, self._module, self._loss_of = algorithm, module, loss_of
        self._named = [(name, p) for name, p in algorithm.named_parameters() if p.requires_grad]
        self._device = self._named[0][1].device
        self._told: list[str] = []
        self._dtype = AUTOCAST[autocast] if autocast else None
        if autocast and self._device.type == "cuda" and not torch.cuda.is_bf16_supported():
            self._dtype = None
            self._left_out("autocast", "this GPU has no bfloat16")
        self._compiled = self._captured = None
        wrapped = module is not algorithm
        if compile and wrapped:
            self._left_out("compile", "what wraps the algorithm is called as it is")
        elif compile:
            self._compiled = torch.compile(algorithm)
        if capture and (why := self._why_no_graph(wrapped)):
            self._left_out("capture", why)
        elif capture:
            self._captured = captured(self._results)

    def __call__(self, batch: TaskBatch) -> MetaOutput:
        for _, parameter in self._named:  # at once: no step needs the memory of the last one's gradients
            parameter.grad = None
        with contextlib.nullcontext() if self._dtype is None else torch.autocast(self._device.type, self._dtype):
            if self._captured is not None:
                found = self._try("capture", lambda: self._captured(batch))
                if found is not None:
                    return self._taken(found)
            if self._compiled is not None:
                output = self._try("compile", lambda: self._backward(self._compiled, batch))
                if output is not None:
                    return output
            return self._plainly(batch)

    def _plainly(self, batch: TaskBatch) -> MetaOutput:
        if self._module is not self._algorithm or not hasattr(self._algorithm, "gradients"):
            return self._backward(self._module, batch)
        output, gradients = self._algorithm.gradients(batch)  # without a graph, where a kernel finds them
        for name, parameter in self._named:
            parameter.grad = gradients.get(name)
        return output

    def _backward(self, module: Callable[[TaskBatch], MetaOutput], batch: TaskBatch) -> MetaOutput:
        output = module(batch)
        with torch.autocast(self._device.type, enabled=False):  # gradients have the dtypes of the forward pass
            self._loss_of(output).backward()
        return output

    def _results(self, batch: TaskBatch) -> dict[str, Tensor]:
        """Output and gradients as a captured step may return them."""
        output = self._plainly(batch)
        found = {"loss": output.loss, "task_loss": output.task_loss}
        if output.accuracy is not None:
            found["accuracy"] = output.accuracy
        gradients = {f"gradient/{name}": p.grad for name, p in self._named if p.grad is not None}
        for _, parameter in self._named:  # or the next one would be added to memory of the recording
            parameter.grad = None
        return {name: tensor.detach() for name, tensor in found.items()} | gradients

    def _taken(self, found: dict[str, Tensor]) -> MetaOutput:
        for name, parameter in self._named:
            parameter.grad = found.get(f"gradient/{name}")
        return MetaOutput(found["loss"], found["task_loss"], found.get("accuracy"))

    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _why_no_graph(self, wrapped: bool) -> str | None:
        if not self._on_gpu():
            return "CUDA graphs need a GPU"
        if wrapped:
            return "what wraps the algorithm may wait for other processes"
        if self._compiled is not None:
            return "torch.compile launches kernels in its own way"
        if getattr(self._algorithm, "task_chunk", None) is not None:
            return "the size of chunks is decided outside a graph"
        if type(self._algorithm).get_extra_state is not nn.Module.get_extra_state:
            return f"{type(self._algorithm).__name__} counts its steps, which a replay does not"
        return None

    def _try(self, what: str, run: Callable):
        """What `run` gives; None if it fails where plain PyTorch may not, and from then on it is left out."""
        before = State(self._algorithm, self._device)
        try:
            return run()
        except Exception as error:
            if memory.ran_out(error):
                raise
            why = " ".join(str(error).split()) or type(error).__name__
        before.restore()
        for _, parameter in self._named:
            parameter.grad = None
        setattr(self, {"compile": "_compiled", "capture": "_captured"}[what], None)
        self._left_out(what, why if len(why) <= 200 else f"{why[:200]} ...")
        return None

    def told_now(self) -> list[str]:
        told, self._told = self._told, []
        return told

    def _left_out(self, what: str, why: str) -> None:
        self._told.append(f"{what} is left out: {why}")
