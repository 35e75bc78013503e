"""The head's phase: how its gradients are clipped, and at what rate it learns.

A rate is bounded twice: by what suits gradients alone, and by what noise would do to a logit.
"""

from __future__ import annotations

import math

from fedlora.common.config.schema import ADAPTIVE, Config, open_fields
from fedlora.common.config.toml import AUTO
from fedlora.common.privacy.central_limit import about_sigma
from fedlora.common.privacy.modes import guarantee_asked
from fedlora.server.defaults.public_facts import (
    Chosen,
    PublicFacts,
    classified,
    head_mu,
    local_rate,
    of_mean,
    questions_of,
    units_of_one,
)

# Of ε. A head on few units a class needs more, and LoRA above it shows less: 592 units of 3 classes
# read 0.32 of entities with 0.6.
HEAD_SHARE, SPARSE, SPARSE_HEAD_SHARE = 0.6, 250, 0.85
HEAD_CLIP = 1.0  # reached by every unit, so that a step has one size
# A logit's standard deviation by the noise of a head phase. Twice or half of it cost 1 to 4 points
# at ε = 1, 3 and 8 on 77 classes.
SHAKEN = 1.6
CLIPPED_HEAD_RATE = 4.5  # times √classes, whose gradients point apart, where noise is no bound
# Where noise leaves so many times that, a clip of the features' length, which few gradients reach:
# clipped to 1, the wrong ones outvote how sure the others are. As many answers were right with it,
# at losses of 0.37 and 0.44 (two classes, ε = 8).
ROOM = 4.0
# Of pairs, which all have features much alike. Where each has one voice, whatever its error, they
# outvote the rarer class; and their gradients add up, so that a large rate throws them about.
PAIRS_HEAD_CLIP, PAIRS_HEAD_RATE = 10.0, 0.6
# Where any number of labels may be right, and a loss is the mean of theirs: a clip over how many
# there are. With 1 and 4.5 the rarer ones are outvoted.
LABELS_HEAD_CLIP, LABELS_HEAD_RATE = 3.0, 13.5
# Of a coordinate, by Adam at the server, for features of length 1. No one rate of plain steps suits
# gradients that nothing clips: 10 was best for 77 classes, and threw two about, to losses of 57.
OPEN_HEAD_STEP = 0.3
OPEN_HEAD_RATE = 1.0  # where plain steps are asked for: slow for many classes, and no ruin for two
# Of any number of labels, a label: Adam lost about what their rates alone lose, or more.
OPEN_LABELS_HEAD_RATE = 3.5


def head_phase(config: Config, facts: PublicFacts) -> Chosen:
    """Every unit in every step: no draw amplifies, and no signal for its ε is better."""
    training, units = config.training, units_of_one(config)
    rate = training.head_sampling_rate if training.head_sampling_rate > 0 else 1.0
    sparse = config.federation.units < SPARSE * facts.classes
    share = SPARSE_HEAD_SHARE if sparse else HEAD_SHARE
    return {
        "training": {
            "head_steps": 1,
            "head_sampling_rate": rate,
            "head_expected_units": units * rate,
            "head_optimizer": "sgd",
            "head_learning_rate": local_rate(config, training.head_optimizer),
        },
        "privacy": {"head_epsilon_share": share},
    }


def head_clip(config: Config, facts: PublicFacts) -> Chosen:
    """What a unit may weigh: one voice each where noise is a bound."""
    questions, model = questions_of(config, facts), config.model
    clip = LABELS_HEAD_CLIP if questions > 1 else HEAD_CLIP
    noisy = guarantee_asked(config.privacy).clip_in_step
    if noisy and facts.classes > 1 and model.pooling == "pairs":
        clip = PAIRS_HEAD_CLIP
    elif noisy and classified(config, facts) and _has_room(config, facts):
        clip = model.head_scale
    return {"privacy": {"head_phase_clip": clip / questions}}


def _has_room(config: Config, facts: PublicFacts) -> bool:
    """Whether noise is no bound by far; not for a rate that somebody chose for another clip, nor on
    whitened features, whose gradients point apart.
    """
    if config.model.projection or "server.head_learning_rate" not in open_fields(config):
        return False
    suits = CLIPPED_HEAD_RATE * math.sqrt(facts.classes)
    return ROOM * suits * _head_shaken(config) <= SHAKEN


def head_step(config: Config, facts: PublicFacts) -> tuple[str, float]:
    """The server's optimiser in a head phase, and its rate."""
    training, given = config.training, config.server.head_optimizer
    if training.head_optimizer == "adamw":
        return "none", 1.0
    noisy, many = guarantee_asked(config.privacy).clip_in_step, questions_of(config, facts)
    if given in ADAPTIVE or (given == AUTO and not noisy and many == 1):
        return "adam", OPEN_HEAD_STEP / config.model.head_scale
    suits = OPEN_HEAD_RATE if many == 1 else OPEN_LABELS_HEAD_RATE * many
    rate = _head_rate(config, facts) if noisy else suits
    return "none", rate / (training.head_learning_rate * training.head_steps)


def _head_rate(config: Config, facts: PublicFacts) -> float:
    """What suits gradients alone, and what noise allows."""
    model, clip = config.model, config.privacy.head_phase_clip
    layers = len(model.pooled_layers) * (model.pooling == "layers" and not model.projection) or 1
    suits = LABELS_HEAD_RATE if questions_of(config, facts) > 1 else CLIPPED_HEAD_RATE
    suits = PAIRS_HEAD_RATE if model.pooling == "pairs" else suits
    rate = min(suits * math.sqrt(max(1, facts.classes)), SHAKEN / _head_shaken(config))
    return rate / clip / math.sqrt(layers)


def _head_shaken(config: Config) -> float:
    """A logit's standard deviation by the noise of a head phase, where clip times rate is 1."""
    training, rounds = config.training, max(1, config.training.head_rounds)
    steps = rounds * training.head_steps
    noise = about_sigma(head_mu(config), training.head_sampling_rate, steps) * of_mean(config)
    # features have length head_scale a layer; with a linear decay a third of squared rates counts
    return noise / training.head_expected_units * config.model.head_scale * math.sqrt(rounds / 3)
