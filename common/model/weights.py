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
    lacking = {name.split(".")[0] for name in _lacking(base, report)}
    inner = base.base_model_prefix
    return tuple(sorted(name for name in lacking if name != inner and not _is_head(name)))


def check_loaded(
    base: PreTrainedModel, report: Mapping[str, Any], where: str, heads: Collection[str] = ()
) -> None:
    """BadInput where what is frozen was not in the files, or is not finite.

    `report` is transformers' (`output_loading_info`); `heads` are trained, as PEFT's own are.
    """
    lacking = sorted(
        name
        for name in _lacking(base, report)
        if name.split(".")[0] not in heads and not any(_is_head(p) for p in name.split(".")[:-1])
    )
    if lacking:
        raise BadInput(
            f"{where}: found no weights of the right shape for {_listed(lacking)}, expected all"
            " that are not trained"
            f"{_hint(base, lacking, report['unexpected_keys'])}"
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


def _lacking(base: PreTrainedModel, report: Mapping[str, Any]) -> set[str]:
    """Tensors of the network that came from no file, or from one of another shape."""
    drawn = set(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]}
    return drawn & set(base.state_dict())  # a pooler that we dropped is gone


def _is_head(module: str) -> bool:
    return module.endswith(PEFT_HEADS)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _hint(base: PreTrainedModel, lacking: list[str], unexpected: Collection[str]) -> str:
    """What to do about it, where that is known."""
    ends = {name: [each for each in unexpected if each.endswith(f".{name}")] for name in lacking}
    if prefixes := {each.removesuffix(name) for name, found in ends.items() for each in found}:
        return f"; the files' names begin with {min(prefixes)!r}"
    if any("pooler" in name.split(".") for name in lacking):
        return '; with pooling = "mean" or "layers" a pooler is not needed'
    return ""
