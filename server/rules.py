"""What a configuration leaves open is chosen here, from public facts: each rule with its reason.

A run has two phases. The head is trained alone, on the frozen base's features: few coordinates
carry noise, and every unit is in every step. Then LoRA moves the base, from a head that passes
gradients on. Validation keeps the better phase, and its best round (`server.rounds.loop`).

A private rate is bounded twice: by what suits gradients alone, and by what noise would do, which
is in proportion to clip / units: a head's by a bound, LoRA's by Adam at the server, whose steps
have one size. Where there are few units, steps are small, and never a ruin (docs/results.md).
"""

from __future__ import annotations

import math
from dataclasses import replace

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import FLEXLORA, Config, config_to_toml, open_fields
from fedlora.common.config.task_names import BY_WORD, CLASSIFIED
from fedlora.common.config.toml import AUTO
from fedlora.common.errors import BadInput
from fedlora.common.privacy.central_limit import about_sigma, gaussian_mu
from fedlora.common.privacy.modes import guarantee_asked
from fedlora.server.head_rules import head_clip, head_step
from fedlora.server.public_facts import Chosen, PublicFacts, head_mu, of_mean, questions_of

HEAD_ROUNDS, LORA_ROUNDS = 30, 60
SPARE = 2  # attempts of a phase that may be lost: to a crash, to Ctrl-C
# Of ε. A head on few units a class needs more, and LoRA above it shows less: 592 units of 3 classes
# read 0.32 of entities with 0.6.
HEAD_SHARE, SPARSE, SPARSE_HEAD_SHARE = 0.6, 250, 0.85
# Clipped LoRA has a voice for what needs none: of two classes 3 gained three points, 1 one. Half a
# number's gradients are below 0.2.
LORA_CLIP, FEW_CLASSES, FEW_CLASSES_CLIP, NUMBER_CLIP = 1.0, 8, 3.0, 0.5
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
WARMUP = 0.1  # of LoRA's rounds: its first gradients are of a B that is zero
ADAMW_RATE, OPEN_RATE = 1e-3, 2e-3  # of LoRA with noise, and without
WHOLE_ROUNDS = 10  # where whole updates are noised: each pays for all of its coordinates
OPEN_BATCH, OPEN_EPOCHS = 32, 3
# Few units go through in smaller batches, and as often as this needs: 90 steps found no disease's
# name. Between two means an institution makes few of them, for with skewed labels each goes its
# own way: ten means of 30 steps left MRPC at 0.68, and sixty of 5 brought it to 0.72.
OPEN_STEPS, SMALLEST_BATCH = 300, 4

# Of public records, before the first round. 500 a class were as good as a private head on the
# frozen base, and 1,000 better; few are learnt by heart.
START_EPOCHS, START_RECORDS = 3, 400

# chosen by what `federation.units` says
BY_UNITS = frozenset(
    ("training.expected_units", "training.head_expected_units", "training.sampling_rate")
)


def decided(config: Config, facts: PublicFacts) -> Config:
    """`config` with a value in every place; BadInput where chosen and given don't fit together."""
    for rule in (_network, _start, _rounds, _head, head_clip, _lora, _local, _server):
        config = filled(config, rule(config, facts))
    return parse_config(config_to_toml(config), "config")


def filled(config: Config, chosen: Chosen) -> Config:
    """`config` with what was chosen; what is given stays."""
    left = open_fields(config)
    sections = {
        name: replace(
            getattr(config, name),
            **{field: value for field, value in values.items() if f"{name}.{field}" in left},
        )
        for name, values in chosen.items()
    }
    return replace(config, **sections)


def _network(config: Config, facts: PublicFacts) -> Chosen:
    """A mean over the words reads what a base knows; a head of its own may be drawn anew.

    Of a pair read as one text it knows little; of two means it knows how far they agree.
    """
    model = config.model
    pooling = "layers" if model.pooled_layers else "mean"
    pooling = "pairs" if len(config.data.text) > 1 else pooling
    pooling = "words" if model.task in BY_WORD else pooling if facts.classes else "default"
    return {"model": {"pooling": pooling}}


def _start(config: Config, facts: PublicFacts) -> Chosen:
    """Public records spare private rounds what they teach.

    Without privacy too: what noise costs is seen between runs that start alike.
    """
    classified = facts.classes > 1 and config.model.task in CLASSIFIED
    enough = classified and facts.learnable >= START_RECORDS * facts.classes
    return {"training": {"public_epochs": START_EPOCHS if enough else 0}}


def _rounds(config: Config, facts: PublicFacts) -> Chosen:
    """A phase each for head and LoRA; of a given number, most for the head, which pays first.

    A head of the base's own can't be counted on to be one that trains by itself. Of a pair that is
    read as one text a frozen base says little, and a head that learnt by heart what it could is a
    worse start than none.
    """
    dealing, head = config.federation, config.training.head_rounds
    asked = guarantee_asked(config.privacy)
    joined = len(config.data.text) > 1 and config.model.pooling != "pairs"
    if head < 0 and (config.model.pooling == "default" or (joined and not asked.private)):
        head = 0
    elif head < 0:
        head = HEAD_ROUNDS if dealing.rounds < 0 else dealing.rounds * 3 // 5
    more = LORA_ROUNDS if asked.clip_in_step or not asked.private else WHOLE_ROUNDS
    return {
        "training": {"head_rounds": head},
        "federation": {
            "rounds": head + more,
            "spare_rounds": SPARE,
            "units": facts.units or _units_meant(config),
        },
    }


def _units_meant(config: Config) -> int:
    """As given, or by what a step expects of an institution; BadInput where neither says so."""
    training, clients = config.training, config.federation.clients
    if config.federation.units > 0:
        return config.federation.units
    expected = training.expected_units / training.sampling_rate
    if training.expected_units < 0 or training.sampling_rate < 0:
        expected = training.head_expected_units / training.head_sampling_rate
        if training.head_expected_units <= 0 or training.head_sampling_rate < 0:
            raise BadInput(
                '[federation] units = "auto": expected about how many privacy units the'
                " institutions have together, where expected_units are to be chosen"
            )
    return max(1, round(clients * expected))


def _head(config: Config, facts: PublicFacts) -> Chosen:
    """Every unit in every step: no draw amplifies, and no signal for its ε is better."""
    training, units = config.training, _units_of_one(config)
    rate = training.head_sampling_rate if training.head_sampling_rate > 0 else 1.0
    sparse = config.federation.units < SPARSE * facts.classes
    share = SPARSE_HEAD_SHARE if sparse else HEAD_SHARE
    return {
        "training": {
            "head_steps": 1,
            "head_sampling_rate": rate,
            "head_expected_units": units * rate,
            "head_optimizer": "sgd",
            "head_learning_rate": _local_rate(config, training.head_optimizer),
        },
        "privacy": {"head_epsilon_share": share},
    }


def _lora(config: Config, facts: PublicFacts) -> Chosen:
    """With noise in each step, few and large ones; else small ones that make up epochs."""
    training, units = config.training, _units_of_one(config)
    asked = guarantee_asked(config.privacy)
    # where there is noise, a head that moves costs some
    alone = asked.private and training.head_rounds and not config.privacy.head_clip
    if asked.clip_in_step:
        drawn = LORA_UNITS / (LORA_ROUNDS * config.federation.units)
        steps, rate = 1, min(LARGEST_DRAW, max(SMALLEST_DRAW, drawn))
        optimizer = "sgd"
    else:
        rounds = config.federation.rounds - training.head_rounds
        batch = min(OPEN_BATCH, max(SMALLEST_BATCH, OPEN_EPOCHS * units / OPEN_STEPS))
        rate = min(1.0, batch / units)
        least = OPEN_STEPS if facts.classes else 1
        steps = max(1, round(max(OPEN_EPOCHS / rate, least) / max(1, rounds)))
        optimizer = "adamw"
    optimizer = optimizer if training.optimizer == AUTO else training.optimizer
    rate = training.sampling_rate if training.sampling_rate > 0 else rate
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
    few = 1 < facts.classes < FEW_CLASSES
    return (FEW_CLASSES_CLIP if few else LORA_CLIP) / questions_of(config, facts)


def _local(config: Config, facts: PublicFacts) -> Chosen:
    """Where the server has to take what comes as it is, SGD's rate is the whole of it."""
    training, rate = config.training, _local_rate(config, config.training.optimizer)
    if config.aggregation.strategy == FLEXLORA and training.optimizer == "sgd":
        rate = _lora_rate(config) / (1 - config.server.momentum) / training.steps
    return {"training": {"learning_rate": rate}}


def _local_rate(config: Config, optimizer: str) -> float:
    """AdamW's step has a size of its own; of SGD's the server's rate is the whole."""
    if optimizer != "adamw":
        return 1.0
    return ADAMW_RATE if guarantee_asked(config.privacy).private else OPEN_RATE


def _server(config: Config, facts: PublicFacts) -> Chosen:
    """A rate is a phase's as a whole: what the nodes' own rate is counts in it."""
    flexlora = config.aggregation.strategy == FLEXLORA
    optimizer, rate = _lora_step(config, facts)
    head_optimizer, head = head_step(config, facts)
    return {
        "server": {
            "optimizer": optimizer,
            "learning_rate": rate,
            "head_optimizer": head_optimizer,
            "head_learning_rate": head,
            "warmup": 0.0 if flexlora else WARMUP,
            "decay": "none" if flexlora else "linear",
            "average_last": 0.0,
        }
    }


def _lora_step(config: Config, facts: PublicFacts) -> tuple[str, float]:
    """The server's optimiser in LoRA's rounds, and its rate."""
    training, given = config.training, config.server.optimizer
    if training.optimizer == "adamw" or config.aggregation.strategy == FLEXLORA:
        return "none", 1.0  # its steps have their size already
    noisy = guarantee_asked(config.privacy).clip_in_step
    if given in ("adam", "yogi") or (given == AUTO and noisy):
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


def _units_of_one(config: Config) -> float:
    """Units that an institution has, about."""
    return max(1.0, config.federation.units / config.federation.clients)
