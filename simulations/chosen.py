"""What a run's configuration left to the rules, and what of its private file that takes as public.

The run's config.toml has a value in every place; chosen.json names those that were chosen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import Config, DataConfig, config_to_toml, open_fields
from fedlora.common.config.toml import AUTO, UNDECIDED, literal
from fedlora.common.data.records import unit_groups
from fedlora.common.disk.files import read_text, write_text
from fedlora.common.errors import BadInput
from fedlora.common.privacy.modes import guarantee_asked
from fedlora.server.defaults.decide import BY_UNITS, decided, filled
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.simulations.federation.public_part import CHOSEN
from fedlora.simulations.federation.sources import Sources

CONFIG = "config.toml"  # in a run's folder, beside CHOSEN
UNITS = "That there are about {units} units is taken as public: rates, normalisers, rounds follow."
PARTS = (
    "Taken from the training file, and public: the {parts}. The records in it are not protected."
)


def decided_for(config: Config, sources: Sources) -> Config:
    """`config` with a value in every place, by the rules and what is public of these records.

    How many units there are is taken as public here, to two digits.
    """
    units, public = len(unit_groups(sources.train.units, len(sources.train))), sources.public
    facts = PublicFacts(rounded(units), public.task.outputs, public.learnable)
    return decided(config, facts)


def differing(config: Config, run: Config) -> list[str]:
    """Where a run that has begun is not the one that `config` describes, as far as it says."""
    left = open_fields(config)
    taken: dict[str, dict[str, Any]] = {}
    for path in left:
        section, field = path.split(".")
        taken.setdefault(section, {})[field] = getattr(getattr(run, section), field)
    if config.lora.targets == (AUTO,):  # what a base has is read when it is loaded
        config = replace(config, lora=replace(config.lora, targets=run.lora.targets))
    if config.training.micro_batch_tokens == UNDECIDED:  # measured, and kept with the run
        tokens = run.training.micro_batch_tokens
        config = replace(config, training=replace(config.training, micro_batch_tokens=tokens))
    given, found = as_given(filled(config, taken)), as_given(run)
    return [
        f"{path} = {literal(given[path])}, the run began with {literal(found[path])}"
        for path in found
        if given[path] != found[path]
    ]


def as_given(config: Config) -> dict[str, Any]:
    """Its values by "section.key"."""
    sections = {name: value for name, value in vars(config).items() if is_dataclass(value)}
    alone = {name: value for name, value in vars(config).items() if name not in sections}
    return alone | {
        f"{name}.{field}": value
        for name, section in sections.items()
        for field, value in vars(section).items()
    }


def rounded(units: int) -> int:
    """To two digits."""
    step = int(10 ** max(0, len(str(units)) - 2))
    return max(1, round(units / step) * step)


def decided_run(
    config: Config, sources: Sources, folder: Path, resume: bool
) -> tuple[Config, tuple[str, ...]]:
    """The configuration of a run, and which fields of it were chosen by rule when it began."""
    if not resume:
        return decided_for(config, sources), open_fields(config)
    kept = folder / CHOSEN  # a run of an earlier version has none
    chosen = _listed(kept) if kept.exists() else ()
    config = parse_config(read_text(folder / CONFIG))
    if "server.warmup" in open_fields(config):  # nor had it a warm-up
        config = replace(config, server=replace(config.server, warmup=0.0))
    if "training.public_epochs" in open_fields(config):  # nor a start on public records
        config = replace(config, training=replace(config.training, public_epochs=0))
    return config, tuple(chosen)


def _listed(path: Path) -> list[str]:
    """Names of fields; BadInput where the file is damaged."""
    try:
        found = json.loads(read_text(path))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise BadInput(f"{path}: found no list of names, expected what rules chose for the run")
    return found


def write_decided(config: Config, chosen: Sequence[str], folder: Path) -> None:
    """What `decided_run` reads when the run is resumed."""
    write_text(folder / CONFIG, config_to_toml(config))
    write_text(folder / CHOSEN, json.dumps(chosen) + "\n")


def taken_as_public(config: Config, chosen: Sequence[str]) -> tuple[str, ...]:
    """Sentences for the statement; none where nothing is promised."""
    if not guarantee_asked(config.privacy).private:
        return ()
    by_units = "federation.units" in chosen and bool(BY_UNITS.intersection(chosen))
    units = UNITS.format(units=config.federation.units)
    return (units,) * by_units + _parts(config.data)


def _parts(data: DataConfig) -> tuple[str, ...]:
    shares = {"test part": data.test, "validation part": data.validation}
    taken = [name for name, source in shares.items() if not isinstance(source, str)]
    if not isinstance(data.test, str) and not data.labels:
        taken.append("label set")
    if not taken:
        return ()
    return (PARTS.format(parts=" and ".join(filter(None, (", ".join(taken[:-1]), taken[-1])))),)
