"""LoRA's phase: how much is drawn, how its gradients are clipped, and at what rates it learns.

A private rate is Adam's at the server, whose steps have one size; under momentum it is bounded by
what noise would do, which is in proportion to clip / units. Where there are few units, steps are
small, and never a ruin (docs/results.md).
"""

from __future__ import annotations

import math

from fedlora.common.config.schema import ADAPTIVE, FLEXLORA, Config
from fedlora.common.config.toml import AUTO
from fedlora.common.privacy.central_limit import about_sigma, gaussian_mu
from fedlora.common.privacy.modes import guarantee_asked
from fedlora.server.defaults.head_rules import HEAD_SHARE
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

LORA_ROUNDS = 60
# Clipped LoRA has a voice for what needs none: of two classes 3 gained three points, 1 one. Half a
# number's gradients are below 0.2.
LORA_CLIP, FEW_CLASSES, FEW_CLASSES_CLIP, NUMBER_CLIP = 1.0, 8, 3.0, 0.5
# Above a start on public records a head is nearly right, and gradients balance: the many that are
# right pull against the few that are not, ten times as long. Any clip that these reach turns the
# mean round (cosine -0.63 at 3, 0.9 at 12), and a step that follows it loses what was there.
ABOVE_START_CLIP, ABOVE_START_STEP = 12.0, 5e-4
# What noise may be of a coordinate of the mean gradient then: LoRA gained with 3.8e-3.
ABOVE_START_NOISE = 5e-3
# Units a class that one institution would need for as little noise. With 32, 40 and 88 LoRA's
# rounds cost a head more ε than they gave, and 15 to 64 times its time; with 140 they gained.
FEW_UNITS = 100
WHOLE_CLIP = 0.1  # of an institution's whole update, which all of them exceed
# Units that LoRA's rounds draw in all: what a machine without a GPU does in minutes. Few units are
# drawn more often, and many at a rate that amplifies well. Beyond the largest draw a step's noise
# for its ε falls by 14 % at most (at ε = 8; 3 % at ε = 3), for five times the passes.
LORA_UNITS, SMALLEST_DRAW, LARGEST_DRAW = 100_000, 0.05, 0.2
# Of a coordinate, by Adam at the server: the first times √(classes / 2), within the others.
LORA_STEP, SMALLEST_LORA_STEP, LARGEST_LORA_STEP = 1e-3, 2e-3, 4e-3
LORA_RATE = 1.0  # of the mean of clipped gradients, under momentum, where that is asked for
OPEN_LORA_RATE = 0.1  # of gradients that nothing clips, under momentum
# How far noise moves a coordinate in such a step, at most. Five times as much ended below the head.
LORA_SHAKEN = 7e-4
OPEN_BATCH, OPEN_EPOCHS = 32, 3
# Few units go through in smaller batches, and as often as this needs: 90 steps found no disease's
# name. Between two means an institution makes few of them, for with skewed labels each goes its
# own way: ten means of 30 steps left MRPC at 0.68, and sixty of 5 brought it to 0.72.
OPEN_STEPS, SMALLEST_BATCH = 300, 4


def above_start(config: Config, facts: PublicFacts) -> bool:
    """Whether LoRA's private rounds begin from what public records taught."""
    noisy = guarantee_asked(config.privacy).clip_in_step
    return noisy and classified(config, facts) and config.training.public_epochs > 0


def lora_is_heard(config: Config, facts: PublicFacts) -> bool:
    """Whether what LoRA's private rounds could learn is not lost in their noise.

    Where it is, the head alone has all of ε, in a quarter of the time or less.
    """
    if not guarantee_asked(config.privacy).clip_in_step:
        return True
    if units_of_one(config) / of_mean(config) < FEW_UNITS * facts.classes:
        return False
    if not above_start(config, facts):
        return True
    privacy = config.privacy
    given, clip = privacy.head_epsilon_share, privacy.clip if privacy.clip > 0 else ABOVE_START_CLIP
    share = given if given > 0 else HEAD_SHARE
    whole, head = (gaussian_mu(each * privacy.epsilon, privacy.delta) for each in (1, share))
    rate, left = _draw(config), math.sqrt(max(0.0, whole**2 - head**2))
    if not left:
        return False
    noise = about_sigma(left, rate, LORA_ROUNDS) * of_mean(config) / (units_of_one(config) * rate)
    return clip * noise <= ABOVE_START_NOISE


def _draw(config: Config) -> float:
    """The share of units that a step of a private round draws: as given, or as suits them."""
    if config.training.sampling_rate > 0:
        return config.training.sampling_rate
    drawn = LORA_UNITS / (LORA_ROUNDS * config.federation.units)
    return min(LARGEST_DRAW, max(SMALLEST_DRAW, drawn))


def lora_phase(config: Config, facts: PublicFacts) -> Chosen:
    """With noise in each step, few and large ones; else small ones that make up epochs."""
    training, units = config.training, units_of_one(config)
    asked = guarantee_asked(config.privacy)
    # where there is noise, a head that moves costs some
    alone = asked.private and training.head_rounds and not config.privacy.head_clip
    if asked.clip_in_step:
        steps, rate, optimizer = 1, _draw(config), "sgd"
    else:
        rounds = config.federation.rounds - training.head_rounds
        batch = min(OPEN_BATCH, max(SMALLEST_BATCH, OPEN_EPOCHS * units / OPEN_STEPS))
        rate = training.sampling_rate if training.sampling_rate > 0 else min(1.0, batch / units)
        least = OPEN_STEPS if facts.classes else 1
        steps = max(1, round(max(OPEN_EPOCHS / rate, least) / max(1, rounds)))
        optimizer = "adamw"
    optimizer = optimizer if training.optimizer == AUTO else training.optimizer
    chosen = {
        "steps": steps,
        "sampling_rate": rate,
        "expected_units": max(1.0, units * rate),
        "optimizer": optimizer,
        "moves": "lora" if alone else "both",
    }
    clip = _lora_clip(config, facts) if asked.clip_in_step else WHOLE_CLIP
    return {"training": chosen, "privacy": {"clip": clip}}


def _lora_clip(config: Config, facts: PublicFacts) -> float:
    if facts.classes == 1:
        return NUMBER_CLIP
    if above_start(config, facts):
        return ABOVE_START_CLIP
    few = 1 < facts.classes < FEW_CLASSES
    return (FEW_CLASSES_CLIP if few else LORA_CLIP) / questions_of(config, facts)


def local_step(config: Config, facts: PublicFacts) -> Chosen:
    """Where the server has to take what comes as it is, SGD's rate is the whole of it."""
    training, rate = config.training, local_rate(config, config.training.optimizer)
    if config.aggregation.strategy == FLEXLORA and training.optimizer == "sgd":
        rate = _lora_rate(config) / (1 - config.server.momentum) / training.steps
    return {"training": {"learning_rate": rate}}


def lora_step(config: Config, facts: PublicFacts) -> tuple[str, float]:
    """The server's optimiser in LoRA's rounds, and its rate."""
    training, given = config.training, config.server.optimizer
    if training.optimizer == "adamw" or config.aggregation.strategy == FLEXLORA:
        return "none", 1.0  # its steps have their size already
    noisy = guarantee_asked(config.privacy).clip_in_step
    if given in ADAPTIVE or (given == AUTO and noisy):
        if above_start(config, facts):
            return "adam", ABOVE_START_STEP
        classes = facts.classes or math.inf  # a language model's are its words
        step = max(SMALLEST_LORA_STEP, LORA_STEP * math.sqrt(classes / 2))
        return "adam", min(LARGEST_LORA_STEP, step)
    return "momentum", _lora_rate(config) / (training.learning_rate * training.steps)


def _lora_rate(config: Config) -> float:
    """Under momentum, likewise."""
    privacy, training = config.privacy, config.training
    if not guarantee_asked(privacy).clip_in_step:
        return OPEN_LORA_RATE
    suits = LORA_RATE / privacy.clip
    rounds = config.federation.rounds - training.head_rounds
    if rounds == 0:
        return suits
    whole, head = gaussian_mu(privacy.epsilon, privacy.delta), head_mu(config)
    left = math.sqrt(whole**2 - head**2) if training.head_rounds else whole
    noise = about_sigma(left, training.sampling_rate, rounds * training.steps)
    noise *= privacy.clip / training.expected_units * of_mean(config)
    return min(suits, LORA_SHAKEN / noise)
