"""Which units of a training file are public, where a part of it takes a public file's place.

A unit is set aside by a keyed hash of itself: whatever else the file holds, and whatever the seed.
By position, one record fewer made 81 of 120 others public, and 20 seeds made 1,399 of 2,000.

The key is the operating system's, drawn once and kept with the account: with a run's folder it
would be another for each run, and over the runs ever more units would become public; made of the
data, one record fewer would be another key. A run keeps a copy, so that it resumes as it began,
elsewhere too. Who has the key learns which units were set aside, and nothing else.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlora.common.codec.framing import KEY_BYTES
from fedlora.common.config.schema import DataConfig
from fedlora.common.data.records import Records, unit_groups
from fedlora.common.data.unit_names import keyed_points, unit_names
from fedlora.common.disk.files import create_once, read_bytes, write_atomically
from fedlora.common.errors import BadInput

KEY = "public-part.key"  # in a run's folder, and in the account's
CHOSEN = "chosen.json"  # in a run's folder: what rules chose; none without it had a key

Bools = npt.NDArray[np.bool_]
# Which of the named units make up a share; from the top or the bottom of their order, so that a
# test part and a validation part of one file have nothing in common.
Choose = Callable[[Sequence[bytes], float, bool], Bools]


@dataclass(frozen=True)
class ByKey:
    """Each unit by itself: about a share of them."""

    key: bytes

    def __call__(self, names: Sequence[bytes], share: float, top: bool) -> Bools:
        points = keyed_points(list(names), self.key)
        return np.asarray(points >= 1 - share if top else points < share)


@dataclass(frozen=True)
class BySeed:
    """By position, as runs that began before units had a key go on."""

    seed: int

    def __call__(self, names: Sequence[bytes], share: float, top: bool) -> Bools:
        order = np.random.Generator(np.random.Philox(self.seed)).permutation(len(names))
        chosen = np.zeros(len(names), dtype=np.bool_)
        chosen[order[: max(1, round(share * len(names)))]] = True
        return chosen


@dataclass(frozen=True)
class Lost:
    """The key is gone, and with it who was public."""

    key: Path

    def __call__(self, names: Sequence[bytes], share: float, top: bool) -> Bools:
        raise BadInput(
            f"{self.key}: missing, expected the key that chose the run's public part; with another"
            " one records that were trained on would become public"
        )


def shares(data: DataConfig) -> dict[str, float]:
    """The parts of [data] that are shares of the training file, by name, in the order taken."""
    named = {"test": data.test, "validation": data.validation}
    return {name: share for name, share in named.items() if not isinstance(share, str)}


def choice_for(data: DataConfig, folder: Path) -> Choose:
    """How a run that begins in `folder` chooses; its key is kept there where it needs one."""
    (folder / KEY).unlink(missing_ok=True)
    if shares(data):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / KEY, account_key(), mode=0o600)
    return kept_choice(folder)


def kept_choice(folder: Path, seed: int = 0) -> Choose:
    """How a run that has begun chooses; one of an earlier version by its seed.

    A run of this version that lost its key must not go on with other units: `Lost` refuses, where
    it is asked.
    """
    path = folder / KEY
    if path.is_file():
        return ByKey(_key(path))
    return Lost(path) if (folder / CHOSEN).exists() else BySeed(seed)


def account_key() -> bytes:
    """The key of whoever runs this, made when it is first asked for; BadInput where it can't be."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(home) / "fedlora" / KEY
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            create_once(path, secrets.token_bytes(KEY_BYTES), mode=0o600)
    except OSError as error:
        raise BadInput(
            f"{path}: can't be written ({error.strerror}), expected a place for the key that"
            " chooses a public part; public files need none"
        ) from error
    return _key(path)


def set_aside(train: Records, part: str, share: float, choose: Choose) -> tuple[Records, Records]:
    """A part of whole units, public from now on, and what is left; BadInput where one is empty."""
    units = unit_groups(train.units, len(train))
    chosen = choose(unit_names(train), share, part == "test")
    if chosen.all() or not chosen.any():
        found = "leaves no unit" if chosen.all() else "takes no unit"
        more = f"a {'smaller' if chosen.all() else 'larger'} share, more units"
        raise BadInput(
            f"[data] {part} = {share}: {found} of {len(units)}, expected {more} or a file"
        )
    picked = np.repeat(chosen, np.diff(units.offsets))
    aside, kept = (np.sort(units.records[each]) for each in (picked, ~picked))
    return train.take(aside, f"{train.where} ({part} part)"), train.take(kept)


def _key(path: Path) -> bytes:
    key = read_bytes(path, KEY_BYTES, f"{KEY_BYTES} random bytes")
    if len(key) != KEY_BYTES:
        raise BadInput(f"{path}: found {len(key)} bytes, expected {KEY_BYTES} random ones")
    return key
