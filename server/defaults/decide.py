"""What a configuration leaves open is chosen here, from public facts: each rule with its reason.

A run has two phases. The head is trained alone, on the frozen base's features: few coordinates
carry noise, and every unit is in every step. Then, where it is heard above its noise, LoRA moves
the base, from a head that passes gradients on. Validation keeps the better phase, and its best
round (`server.rounds.loop`).

`head_rules` and `lora_rules` are the phases' own.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import FLEXLORA, Config, config_to_toml, open_fields
from fedlora.common.config.task_names import BY_WORD
from fedlora.common.errors import BadInput
from fedlora.common.privacy.modes import guarantee_asked
from fedlora.server.defaults.head_rules import head_clip, head_phase, head_step
from fedlora.server.defaults.lora_rules import (
    LORA_ROUNDS,
    local_step,
    lora_is_heard,
    lora_phase,
    lora_step,
)
from fedlora.server.defaults.public_facts import Chosen, PublicFacts, classified

HEAD_ROUNDS = 30
SPARE = 2  # attempts of a phase that may be lost: to a crash, to Ctrl-C
WARMUP = 0.1  # of LoRA's rounds: its first gradients are of a B that is zero
WHOLE_ROUNDS = 10  # where whole updates are noised: each pays for all of its coordinates
# Of public records, before the first round. 500 a class were as good as a private head on the
# frozen base, and 1,000 better; few are learnt by heart.
START_EPOCHS, START_RECORDS = 3, 400

# chosen by what `federation.units` says
BY_UNITS = frozenset(
    (
        *("training.expected_units", "training.head_expected_units", "training.sampling_rate"),
        "federation.rounds",
    )
)


def decided(config: Config, facts: PublicFacts) -> Config:
    """`config` with a value in every place; BadInput where chosen and given don't fit together."""
    for rule in RULES:
        config = filled(config, rule(config, facts))
    return parse_config(config_to_toml(config), "config")


def _units(config: Config, facts: PublicFacts) -> Chosen:
    return {"federation": {"units": facts.units or _units_meant(config)}}


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
    enough = classified(config, facts) and facts.learnable >= START_RECORDS * facts.classes
    return {"training": {"public_epochs": START_EPOCHS if enough else 0}}


def _rounds(config: Config, facts: PublicFacts) -> Chosen:
    """A phase each for head and LoRA; of a given number, most for the head, which pays first.

    A head of the base's own can't be counted on to be one that trains by itself. Of a pair that is
    read as one text a frozen base says little, and a head that learnt by heart what it could is a
    worse start than none. Under noise LoRA has rounds where it is heard, or where `moves` or
    `head_clip` is given, which is asking for them.
    """
    dealing, head = config.federation, config.training.head_rounds
    asked = guarantee_asked(config.privacy)
    joined = len(config.data.text) > 1 and config.model.pooling != "pairs"
    asking = "training.moves" not in open_fields(config) or config.privacy.head_clip > 0
    alone = not asking and not lora_is_heard(config, facts)
    if head < 0 and (config.model.pooling == "default" or (joined and not asked.private)):
        head = 0
    elif head < 0:
        given = dealing.rounds if alone else dealing.rounds * 3 // 5
        head = HEAD_ROUNDS if dealing.rounds < 0 else given
    more = LORA_ROUNDS if asked.clip_in_step or not asked.private else WHOLE_ROUNDS
    return {
        "training": {"head_rounds": head},
        "federation": {"rounds": head + more * (not (head and alone)), "spare_rounds": SPARE},
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


def _server(config: Config, facts: PublicFacts) -> Chosen:
    """A rate is a phase's as a whole: what the nodes' own rate is counts in it."""
    flexlora = config.aggregation.strategy == FLEXLORA
    optimizer, rate = lora_step(config, facts)
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


# in their order: what one chose the next may read
RULES = (
    *(_network, _start, _units, _rounds),
    *(head_phase, head_clip, lora_phase, local_step, _server),
)
