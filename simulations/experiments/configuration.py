"""A configuration as a person names it: a file or a packaged one, and what is to be different."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.common.config import load
from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import Config, config_to_toml
from fedlora.common.config.toml import literal
from fedlora.common.errors import BadInput
from fedlora.simulations.federation.packaged import packaged_config

TEST_SHARE = 0.1  # of the training file, where no test file is named


def load_config(
    source: str | Path | None = None,
    overrides: Sequence[str] = (),
    **sections: Mapping[str, object] | int,
) -> Config:
    """A TOML file, a packaged configuration by name, or the defaults, with some values changed.

    `overrides` are "section.key=VALUE"; `sections` say the same as keywords, and come last:
    `load_config("ag_news", seed=3, privacy={"epsilon": 1.0})`. BadInput lists every fault.
    """
    if isinstance(overrides, str):
        raise BadInput(f"overrides: found {overrides!r}, expected a list of section.key=VALUE")
    given = [*overrides, *_overrides(sections)]
    try:
        if source is None:
            return parse_config("", "config", given)
        return load.load_config(packaged_config(Path(source)), given)
    except BadInput as error:
        raise BadInput([fault.removeprefix("--set ") for fault in error.faults]) from error


def described(
    train: Path | None,
    test: Path | None,
    epsilon: str | None,
    **fields: str | int | tuple[str, ...] | None,
) -> list[str]:
    """What a command line says without a configuration file, as overrides.

    Without a test file a tenth of the training file is set aside as public. `fields` are named
    `section_key`; those that are None are left out. BadInput for an ε that is neither a number nor
    "none".
    """
    given = [] if train is None else [f"data.train={literal(str(train))}"]
    if test is not None:
        given.append(f"data.test={literal(str(test))}")
    elif train is not None:
        given.append(f"data.test={TEST_SHARE}")
    if epsilon == "none":
        given.append("privacy.mode=none")
    elif epsilon is not None:
        given.append(f"privacy.epsilon={epsilon}")
    for name, value in fields.items():
        if value is not None:
            given.append(f"{name.replace('_', '.', 1)}={literal(value)}")
    return given


def changed(config: Config, *overrides: str) -> Config:
    """`config` with "section.key=VALUE" laid over it; BadInput lists every fault."""
    return parse_config(config_to_toml(config), "config", overrides)


def override(path: str, value: object) -> str:
    """A value of Python as "section.key=VALUE"; text stays as it is."""
    if isinstance(value, list):
        value = tuple(value)
    return f"{path}={value if isinstance(value, str) else literal(value)}"


def _overrides(sections: Mapping[str, Any]) -> Iterator[str]:
    for name, values in sections.items():
        if not isinstance(values, Mapping):
            yield override(name, values)
            continue
        for key, value in values.items():
            # a string is that string, also where TOML would read a number
            text = isinstance(value, str | Path)
            yield (
                f"{name}.{key}={literal(str(value))}" if text else override(f"{name}.{key}", value)
            )
