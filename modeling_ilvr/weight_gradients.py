"""Gradients of weights that a sequence uses in many chunks: one matrix product for all chunks in place of one each.

The gradient of a weight for a single column is an outer product as large as the weight. Autograd makes one for each
column and adds them up, which moves more memory than all the rest of a walk.

N rows (columns of all sequences of a batch), in and out the sizes of a linear map.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class _Uses:
    """Inputs (N, in) of a linear map and gradients (N, out) of its outputs, for each running backward pass."""

    WIDE = 64  # rows from which a product of its own costs less than a copy into a common one

    def __init__(self) -> None:
        self.by_pass = {}

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        use = inputs.flatten(0, -2), gradients.flatten(0, -2)
        self.by_pass.setdefault(torch._C._current_graph_task_id(), []).append(use)

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What was added in this backward pass, in as many pairs as there are products to make."""
        uses = self.by_pass.pop(torch._C._current_graph_task_id())
        narrow = [use for use in uses if len(use[0]) < self.WIDE]
        wide = [use for use in uses if len(use[0]) >= self.WIDE]
        if not narrow:
            return wide
        inputs, gradients = map(torch.cat, zip(*narrow))
        return [*wide, (inputs, gradients)]


class _Collect(torch.autograd.Function):
    """A scalar without a value or gradient, whose backward pass comes after that of all that use it."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, bias: torch.Tensor | None, uses: _Uses) -> torch.Tensor:
        ctx.uses, ctx.has_bias = uses, bias is not None
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        uses = ctx.uses.take()
        (inputs, gradients), *others = uses
        gradient = gradients.T @ inputs
        for inputs, gradients in others:
            gradient.addmm_(gradients.T, inputs)
        return gradient, sum(g.sum(0) for _, g in uses) if ctx.has_bias else None, None


class _Linear(torch.autograd.Function):
    """A linear map that leaves the gradients of weight and bias to `_Collect`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        collector: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        uses: _Uses,
    ) -> torch.Tensor:
        ctx.uses = uses
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        ctx.uses.add(inputs, gradients)
        gradient = gradients @ weight if ctx.needs_input_grad[0] else None
        return gradient, None, None, None, None


class GatheredWeightGradients(TorchFunctionMode):
    """While it is entered, linear maps put the gradients of their weights off until those of all their uses are known.

    Entered once for each chunk of a sequence. Weights that are frozen, quantised, or distributed tensors are used as
    ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collected = {}

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is linear:
            return self._linear(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        plain = type(weight) in (torch.Tensor, Parameter)
        if not (plain and weight.requires_grad and torch.is_grad_enabled()):
            return linear(input, weight, bias)
        if id(weight) not in self.collected:
            self.collected[id(weight)] = weight, *self._collect(weight, bias, input.device.type)
        _, collector, weight, bias, uses = self.collected[id(weight)]
        return _Linear.apply(input.to(weight.dtype), collector, weight, bias, uses)

    def _collect(
        self, weight: torch.Tensor, bias: torch.Tensor | None, device_type: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, _Uses]:
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        uses = _Uses()
        # The view is a node between: gradients of the bias, then the weight, are ready in autograd's own order. ZeRO-2
        # adds up what the ranks have ready first, whatever it is.
        collector = _Collect.apply(weight.view_as(weight), bias, uses)
        return collector, weight.detach(), None if bias is None else bias.detach(), uses
