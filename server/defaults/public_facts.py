"""What rules choose from: the numbers that a coordinator states, before a network is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.common.config.schema import Config
from fedlora.common.config.task_names import CLASSIFIED, MANY_LABELS
from fedlora.common.privacy.central_limit import gaussian_mu
from fedlora.common.privacy.modes import guarantee_asked

# of AdamW, with noise and without
ADAMW_RATE, OPEN_RATE = 1e-3, 2e-3

Chosen = Mapping[str, Mapping[str, Any]]  # by section and field


@dataclass(frozen=True)
class PublicFacts:
    """What is known before a network is built. `units` of all institutions together, about."""

    units: int
    classes: int  # numbers that a head gives; 0: a language model
    learnable: int = 0  # public records that may be learnt from, and do not score


def classified(config: Config, facts: PublicFacts) -> bool:
    """Whether a record has one of several classes."""
    return facts.classes > 1 and config.model.task in CLASSIFIED


def questions_of(config: Config, facts: PublicFacts) -> int:
    """Whose losses a record's is the mean of: its gradients are shorter by as many."""
    return max(1, facts.classes) if config.model.task in MANY_LABELS else 1


def head_mu(config: Config) -> float:
    """What the head phase has of ε and δ, as a Gaussian mechanism's μ: all, where it is alone."""
    privacy, alone = config.privacy, config.training.head_rounds == config.federation.rounds
    share = 1.0 if alone else min(0.99, privacy.head_epsilon_share)
    return gaussian_mu(share * privacy.epsilon, privacy.delta)


def of_mean(config: Config) -> float:
    """What is left of a whole noise in the mean over a round's institutions, about."""
    asked = max(1.0, config.federation.participation * config.federation.clients)
    part = guarantee_asked(config.privacy).noise_part(asked, config.aggregation)
    return math.sqrt(part / asked)


def units_of_one(config: Config) -> float:
    """Units that an institution has, about."""
    return max(1.0, config.federation.units / config.federation.clients)


def local_rate(config: Config, optimizer: str) -> float:
    """AdamW's step has a size of its own; of SGD's the server's rate is the whole."""
    if optimizer != "adamw":
        return 1.0
    return ADAMW_RATE if guarantee_asked(config.privacy).private else OPEN_RATE
