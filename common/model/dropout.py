"""Every kind of dropout off: in the configuration, before the network is built from it, and after
in its modules.

Families spell it in a dozen ways: `nn.Dropout`, a number that is handed to `functional.dropout`,
layers that are skipped (`layerdrop`, stochastic depth), noise on a router. All of them are numbers
under a name with "drop" or "jitter" in it, so none is listed here. A private step is noisy already,
and each example's gradient must depend on that example alone; `common.model.behaviour` sees by
trying that nothing is drawn any more.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

_CHANCE = re.compile("drop|jitter", re.IGNORECASE)


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, changed in place, with every chance of its own and of its parts at 0."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif _is_chance(name, value):
            setattr(config, name, type(value)(0))
    return config


def switch_dropout_off(network: nn.Module) -> None:
    """Every module's chances to 0, whatever configuration they came from."""
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_chance(name, value):
                setattr(module, name, type(value)(0))


def _is_chance(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return bool(number and value and _CHANCE.search(name))
