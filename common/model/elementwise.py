"""Elementwise functions on a CPU: each record by itself, since their last digit goes by place.

Such a kernel cuts a tensor among threads, takes the most of each piece by vectors, and what is left
at its end by other code, whose exponential rounds otherwise. Which records stand there is a matter
of chance, and a try that draws values sees it at some of them only. So it is not left to a try:
`by_record` hands a kernel one record at a time, as a tensor of one shape whatever the batch, and
`Watch` sees in a try whether one was given several together all the same.

Arithmetic that IEEE 754 rounds is exact. Sums, products, norms and softmax go by rows, and add up
differently by place for nearly all values or for none: those a try does see. A head's product has
one row a record, and one row or two of them have kernels of their own: it is filled up to `ROWS`,
so that a record gets the same bits among however many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# fmt: off
# By their names as functions and methods of torch. Each takes one tensor.
APART = {
    "atan", "celu", "cos", "elu", "erf", "erfc", "exp", "exp2", "expm1", "gelu", "hardsigmoid",
    "hardswish", "log", "log1p", "log2", "log_sigmoid", "logsigmoid", "mish", "pow", "rms_norm",
    "rsqrt", "selu", "sigmoid", "silu", "sin", "softplus", "tan", "tanh", "tanhshrink",
}
# By their names as kernels. The same bits by a vector and without: one operation a value, or none.
EXACT = {
    "abs", "add", "ceil", "clamp", "clamp_max", "clamp_min", "clone", "div", "floor", "hardtanh",
    "leaky_relu", "masked_fill", "maximum", "minimum", "mul", "nan_to_num", "neg", "reciprocal",
    "relu", "round", "rsub", "sgn", "sign", "sqrt", "sub", "threshold", "threshold_backward",
    "trunc", "where",
}
# Elementwise, though torch has no such tag on them.
UNTAGGED = {
    "binary_cross_entropy", "binary_cross_entropy_backward", "elu_backward", "glu", "glu_backward",
    "hardsigmoid_backward", "hardswish", "hardswish_backward", "huber_loss", "huber_loss_backward",
    "log_sigmoid_backward", "log_sigmoid_forward", "mish_backward", "smooth_l1_loss",
    "smooth_l1_loss_backward", "softplus_backward",
}
# fmt: on
ROWS = 16  # of a product with one row a record, at the least


def by_record(records: int, device: torch.device) -> AbstractContextManager[Any]:
    """As long as this lasts, forward and backward, no elementwise kernel has two of a batch's
    `records`, and no product of one row each has few rows. 0 records: not of a fixed shape.
    """
    if records < 1 or device.type != "cpu":
        return nullcontext()  # a GPU's kernels compute what is left over as they do the rest
    return _ByRecord(records)


def rounds_by_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that torch dispatches is elementwise, and not exact."""
    name = func.overloadpacket.__name__.rstrip("_")
    if name == "pow" and isinstance(args[1], int | float) and args[1] in (1, 2, 3):  # products
        return False
    exact = name in EXACT and kwargs.get("alpha", 1) == 1  # else two operations, or one fused
    return not exact and (torch.Tag.pointwise in func.tags or name in UNTAGGED)


class _ByRecord(TorchFunctionMode):
    def __init__(self, records: int) -> None:
        super().__init__()
        self._records = records

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "linear" and args and self._has_a_row_each(args[0]):
            filled = functional.pad(args[0], (0, 0, 0, ROWS - self._records))
            return func(filled, *args[1:], **given)[: self._records]
        place = self._place(args, given) if name in APART else None
        if place is None:
            return func(*args, **given)
        before, whole, after = args[:place], args[place], args[place + 1 :]
        # one row each, so that no part looks like several records
        parts = whole.unflatten(0, (self._records, -1)).split(1)
        return torch.cat([func(*before, part, *after, **given) for part in parts]).flatten(0, 1)

    def _has_a_row_each(self, value: Any) -> bool:
        return _has_values(value) and value.ndim == 2 and len(value) == self._records < ROWS

    def _place(self, args: tuple[Any, ...], given: dict[str, Any]) -> int | None:
        """Of the one tensor among what is given, where it can be split."""
        everything = *args, *given.values()
        tensors = [n for n, each in enumerate(everything) if _has_values(each)]
        one = len(tensors) == 1 and tensors[0] < len(args) and not given.get("inplace")
        return tensors[0] if one and _has_rows(args[tensors[0]], self._records) else None


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`beside`: an elementwise kernel on a CPU had values of several of `records` together."""

    def __init__(self, records: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.beside = False
        self._records = records

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        found = func(*args, **given)
        if self._records > 1 and rounds_by_place(func, args, given):
            results = found if isinstance(found, tuple | list) else (found,)
            self.beside |= any(_has_rows(each, self._records) for each in results)
        return found


def _has_values(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _has_rows(value: Any, records: int) -> bool:
    """Whether it is a tensor of fractions on a CPU whose rows may be those of so many records."""
    return (
        _has_values(value)
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.numel() > 0
        and len(value) % records == 0
    )
