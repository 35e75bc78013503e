"""Ways to train that a researcher compares, each as what it changes in a configuration.

given       as the file is, and what it leaves open by rule: what the others are held against
head        a head alone, on features of the frozen base; no noise is spent on LoRA
lora        LoRA and the head together, from the first round on
head+lora   the head first, then LoRA below it
ffa         the same with LoRA's A frozen (FFA-LoRA, Sun et al. 2024)
rolora      the same with LoRA's B and A by turns (RoLoRA, Chen et al. 2024)
flexlora    the same with the mean of the products B·A, cut to the rank (FlexLoRA, Bai et al. 2024)
central     the same by one institution that has all records: what a trusted third party would reach
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedlora.common.config.schema import FLEXLORA, AggregationConfig, Config, FaultsConfig
from fedlora.common.config.task_names import LABELLED, LANGUAGES
from fedlora.common.config.toml import AUTO, UNDECIDED, suggestion
from fedlora.common.errors import BadInput
from fedlora.common.privacy.modes import guarantee_asked
from fedlora.server.defaults.decide import HEAD_ROUNDS

Method = Callable[[Config], Config]


def method_named(name: str) -> Method:
    """The method; BadInput where there is none of that name."""
    if name not in METHODS:
        raise BadInput(
            f"method {name!r}: expected one of {', '.join(METHODS)}{suggestion(name, METHODS)}"
        )
    return METHODS[name]


def _head(config: Config) -> Config:
    rounds = config.federation.rounds
    given = HEAD_ROUNDS if rounds == UNDECIDED else rounds
    federation = replace(config.federation, rounds=given)
    return _training(replace(config, federation=federation), head_rounds=given)


def _lora(config: Config) -> Config:
    return _training(config, head_rounds=0, moves="both")


def _head_and_lora(config: Config) -> Config:
    """As given where both have rounds, else as the rules divide them; prompts have no head."""
    if config.model.task in LANGUAGES or config.model.pooling == "default":
        return _lora(config)
    both = 0 < config.training.head_rounds < config.federation.rounds
    return config if both else _asking_for_lora(_training(config, head_rounds=UNDECIDED))


def _asking_for_lora(config: Config) -> Config:
    """Rules leave LoRA's rounds out where they expect nothing of them: not where it is asked."""
    privacy, training, rounds = config.privacy, config.training, config.federation.rounds
    # a head phase is sure: a task of one's own may have none
    task, some = config.model.task, rounds == UNDECIDED or rounds * 3 // 5 > 0
    headed = some and task in (*LABELLED, "regression")
    noisy = guarantee_asked(privacy).private and not privacy.head_clip
    asking = headed and noisy and training.moves == AUTO
    return _training(config, moves="lora") if asking else config


def _variant(name: str) -> Method:
    def changed(config: Config) -> Config:
        config = _head_and_lora(config)
        return replace(config, lora=replace(config.lora, variant=name))

    return changed


def _flexlora(config: Config) -> Config:
    config = _training(_head_and_lora(config), carry_optimizer=False)
    return replace(config, aggregation=replace(config.aggregation, strategy=FLEXLORA))


def _central(config: Config) -> Config:
    """A step's units are those of all institutions together."""
    many, training = config.federation.clients, config.training
    units = ("expected_units", "head_expected_units")
    known = {name: getattr(training, name) for name in units if getattr(training, name) > 0}
    scaled = {name: many * each for name, each in known.items()}
    return _training(_head_and_lora(one_institution(config)), **scaled)


def one_institution(config: Config) -> Config:
    """`config` with a single institution, which neither masks nor shares its noise."""
    return replace(
        config,
        federation=replace(
            config.federation, clients=1, participation=1.0, partition="iid", column=""
        ),
        aggregation=AggregationConfig(),
        privacy=replace(config.privacy, noise="own"),
        faults=FaultsConfig(),
    )


def _training(config: Config, **fields: Any) -> Config:
    return replace(config, training=replace(config.training, **fields))


METHODS: dict[str, Method] = {
    "given": lambda config: config,
    "head": _head,
    "lora": _lora,
    "head+lora": _head_and_lora,
    "ffa": _variant("ffa"),
    "rolora": _variant("rolora"),
    "flexlora": _flexlora,
    "central": _central,
}
