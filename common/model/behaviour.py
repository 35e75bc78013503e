"""What a network does, seen by trying it on texts of nobody's.

Names and documentation of an architecture promise much; what a private step rests on is tried: that
nothing is drawn at random, that a language model does not look ahead, and whether the arithmetic of
one record is shaped by the words of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from fedlora.common.errors import BadInput
from fedlora.common.model.elementwise import rounds_by_place

RECORDS, TOKENS = 3, 7  # of what is tried: short texts, and neither is a usual width
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids and mask to logits


def texts(
    vocabulary: int, device: torch.device, longest: int = TOKENS, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of `RECORDS` random texts of `TOKENS`, or `longest`; the last one is padding."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, vocabulary, (RECORDS, min(TOKENS, longest))))
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    return ids.to(device), mask.to(device)


def check_still(forward: Forward, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """BadInput where two passes over one batch differ: the network draws something at random.

    Each draw gives its least value in one pass, and nearly its greatest in the other, so that what
    happens seldom, as the skipping of a layer, is seen as surely as what happens everywhere.
    """
    found = []
    for value in (0.0, 1.0 - 2**-20):
        with torch.no_grad(), torch.random.fork_rng(_devices(ids)), _Draws(value):
            torch.manual_seed(int(value > 0))
            found.append(torch.nan_to_num(forward(ids, mask)))
    if not torch.equal(*found):
        raise BadInput(
            "[model] base: found two passes over one batch that differ, expected no dropout and no"
            " other randomness"
        )


def check_causal(forward: Forward, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """BadInput where a word changes what is predicted for the places before it."""
    changed, place = ids.clone(), ids.shape[1] - 2
    changed[:, place] = (ids[:, place] == 0).long()
    with torch.no_grad():
        before, after = (forward(each, mask)[:, :place].float() for each in (ids, changed))
    if (before - after).abs().max() > 1e-3 * before.abs().max():
        raise BadInput(
            '[model] task = "causal-lm": found a network that reads what it is to predict, expected'
            " a decoder"
        )


def is_routed(
    forward: Forward,
    one: tuple[torch.Tensor, torch.Tensor],
    other: tuple[torch.Tensor, torch.Tensor],
) -> bool:
    """Whether products are shaped by what a batch says, not by its shape alone, which is the same.

    Experts are: a word's product is computed together with whatever words chose the same expert.
    """
    first, second = (_found(_Trace(), forward, *each) for each in (one, other))
    return first != second or any("grouped_mm" in name for name, *_ in first)


def mixes_records(forward: Forward, ids: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a function that rounds by place is given anything but one record after the other.

    XLNet has the records' words by turns, experts that all words go through have them one expert
    after the other. Seen by another record in the second row: it may change nothing else.
    """
    changed = ids.clone()
    changed[1] = ids[0]
    before, after = (_found(_ByPlace(), forward, each, mask) for each in (ids, changed))
    return len(before) != len(after) or any(
        _changes_others(one, other, len(ids)) for one, other in zip(before, after, strict=True)
    )


def _changes_others(before: torch.Tensor, after: torch.Tensor, records: int) -> bool:
    if before.shape != after.shape:
        return True
    changed = (before != after) & ~(before.isnan() & after.isnan())
    if before.ndim == 0 or len(before) % records:
        return bool(changed.any())
    by_record = changed.reshape(records, -1).any(dim=1)
    by_record[1] = False
    return bool(by_record.any())


def called(base: PreTrainedModel, given: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Names of the modules that a forward pass of what is `given` goes through."""
    names: set[str] = set()

    def watch(name: str) -> Any:
        return lambda *_: names.add(name)

    hooks = [each.register_forward_pre_hook(watch(name)) for name, each in base.named_modules()]
    try:
        with torch.no_grad():
            both = base.config.is_encoder_decoder
            base(**given, **({"decoder_input_ids": given["input_ids"]} if both else {}))
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(names)


def _devices(ids: torch.Tensor) -> list[torch.device]:
    return [] if ids.device.type == "cpu" else [ids.device]


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whatever is drawn at random comes out as `value`."""

    def __init__(self, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn and isinstance(result, torch.Tensor) and result.is_floating_point():
            result.fill_(self.value)
        return result


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation with the shapes of the tensors that it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(each.shape) for each in args if isinstance(each, torch.Tensor)]
        self.found.append((str(func), *shapes))
        return func(*args, **(kwargs or {}))


class _ByPlace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every tensor that is given to a function that rounds by place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if rounds_by_place(func, args, kwargs or {}):
            self.found += [each.clone() for each in args if isinstance(each, torch.Tensor)]
        return func(*args, **(kwargs or {}))


def _found(
    by: _Trace | _ByPlace, forward: Forward, ids: torch.Tensor, mask: torch.Tensor
) -> list[Any]:
    with torch.no_grad(), by:
        forward(ids, mask)
    return by.found
