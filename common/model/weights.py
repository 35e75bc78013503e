"""What a base's files hold against what its network needs.

transformers draws what is missing at random, anew in each process: under one digest, institutions,
a resumed run and whoever loads the adapter would each have another network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from fedlora.common.errors import BadInput

# How the modules end that PEFT takes for a model's own head, and trains.
PEFT_HEADS = ("classifier", "score")
_SHOWN = 3  # names in a message


def new_heads(base: PreTrainedModel, report: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules above the transformer itself, PEFT's apart, whose weights no file has.

    A DeBERTa's pooler is one: it belongs to the classifier, so it is trained with it.
    """
    drawn = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    modules = {name.split(".")[0] for name in _kept(base, drawn)} - {base.base_model_prefix}
    return tuple(sorted(name for name in modules if not _is_head(name)))


def check_loaded(
    base: PreTrainedModel, report: Mapping[str, Any], where: str, heads: Collection[str] = ()
) -> None:
    """BadInput where what is frozen was not in the files, or is not finite.

    `report` is transformers' (`output_loading_info`); `heads` are trained, as PEFT's own are.
    """
    for what, drawn in (
        ("in the files", set(report["missing_keys"])),
        ("of the right shape", {name for name, *_ in report["mismatched_keys"]}),
    ):
        lost = sorted(each for each in _kept(base, drawn) if not _is_trained(each, heads))
        if lost:
            raise BadInput(
                f"{where}: found no weights {what} for {_listed(lost)}, expected all that are not"
                f" trained{_hint(lost, report['unexpected_keys'])}"
            )
    wrong = sorted(
        name
        for name, value in base.state_dict().items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    )
    if wrong:
        raise BadInput(
            f"{where}: found values that are not finite in {_listed(wrong)}, expected numbers"
        )


def _kept(base: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Of tensors that were drawn at random those that are still there: a pooler may be dropped."""
    return set(names) & set(base.state_dict())


def _is_trained(tensor: str, heads: Collection[str]) -> bool:
    first, *_ = modules = tensor.split(".")
    return first in heads or any(_is_head(module) for module in modules[:-1])


def _is_head(module: str) -> bool:
    return module.endswith(PEFT_HEADS)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + f" ({len(names)} such)"


def _hint(lost: list[str], unexpected: Collection[str]) -> str:
    """What to do about it, where that is known."""
    ends = {name: [each for each in unexpected if each.endswith(f".{name}")] for name in lost}
    if prefixes := {each.removesuffix(name) for name, found in ends.items() for each in found}:
        return f"; the files' names begin with {min(prefixes)[:80]!r}"
    if any("pooler" in name.split(".") for name in lost):
        return '; with pooling = "mean" or "layers" a pooler is not needed'
    return ""
