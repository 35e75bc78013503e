"""A partition of one's own: institutions that see messages of different length.

It shows what a partition is given and what it gives: the records with their columns, the units of
privacy as groups of rows, and back the institution of each unit. It can't split a unit, and a run
that is resumed under another partition is refused: ε holds for a record at one institution.

    python -m fedlora.simulations.examples.own_partition
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlora.simulations import Records, Result, UnitIndex, simulate
from fedlora.simulations.examples.private_federation import federation

CLIENTS = 5


def by_length(records: Records, units: UnitIndex) -> npt.NDArray[np.int64]:
    """(units,) the institution of each: the shortest messages are at 0, the longest at the last."""
    firsts = units.records[units.offsets[:-1]]  # unit u has rows records[offsets[u]:offsets[u + 1]]
    lengths = np.array([len(records.texts[row]) for row in firsts])
    rank = np.empty(len(units), dtype=np.int64)
    rank[np.argsort(lengths, kind="stable")] = np.arange(len(units))
    return rank * CLIENTS // len(units)


def main(folder: Path, base: str = "minilm", rounds: int = 20) -> Result:
    """Train on institutions dealt by `by_length`, and print how each fares."""
    result = simulate(federation(folder, base, rounds), folder / "run", partition=by_length)
    for name, accuracy in result.summary["accuracy_by_client"].items():
        print(f"{name}: accuracy {accuracy:.3f} of its mix of labels")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/own_partition"))
