"""Dealing units to simulated institutions: none is ever split, and each is dealt exactly once.

    iid        each unit to a client drawn uniformly, sizes equal to within one
    dirichlet  each label's units are cut by proportions from Dirichlet(alpha)  (Hsu et al. 2019)
    by-column  one client for each value of a column: the institutions that the data set names
    shards     units sorted by label, cut into two shards a client             (McMahan et al. 2017)
    quantity   sizes from Dirichlet(alpha), labels alike everywhere

Every client gets at least one unit. Memory is linear in units and clients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.common.config.schema import FederationConfig
from fedlora.common.config.toml import shown
from fedlora.common.data.records import Records, UnitIndex
from fedlora.common.errors import BadInput

Ints = npt.NDArray[np.int64]
# a partition of one's own: the client, from 0, of each unit
Owners = Callable[[Records, UnitIndex], npt.ArrayLike]
SHARDS_PER_CLIENT = 2


@dataclass(frozen=True, eq=False)
class Partition:
    """Client c holds units[offsets[c]:offsets[c + 1]]; `names` is empty where clients have none."""

    offsets: Ints
    units: Ints
    names: tuple[str, ...] = ()

    def units_of(self, client: int) -> Ints:
        """Indices of a client's units."""
        return self.units[self.offsets[client] : self.offsets[client + 1]]

    @property
    def sizes(self) -> Ints:
        """(clients,) number of units of each."""
        return np.diff(self.offsets)

    @property
    def digest(self) -> str:
        """Of who holds what; it says something of the data, and stays with them."""
        parts = (self.offsets, self.units)
        held = b"".join(each.astype("<i8", copy=False).tobytes() for each in parts)
        return "sha256:" + hashlib.sha256(held).hexdigest()


def partition_units(
    config: FederationConfig, records: Records, units: UnitIndex, seed: int
) -> Partition:
    """Deal `units` out as the configuration says; BadInput where there are too few."""
    if len(units) < config.clients:
        raise BadInput(
            f"{records.where}: found {len(units)} {'units' if records.units else 'records'}, "
            f"expected at least one for each of [federation] clients = {config.clients}"
        )
    rng = np.random.Generator(np.random.Philox(seed))
    if config.partition == "by-column":
        return _by_column(config, records, units)
    owners = DEALERS[config.partition](
        _unit_labels(records, units), config.clients, config.alpha, rng
    )
    return _grouped(owners, config.clients)


def partition_by(owners_of: Owners, clients: int, records: Records, units: UnitIndex) -> Partition:
    """Deal each unit out to the client that `owners_of` names.

    BadInput unless it gives one of `clients` numbers for each unit, and each client a unit.
    """
    owners = np.asarray(owners_of(records, units))
    if owners.shape != (len(units),) or owners.dtype.kind not in "iu":
        raise BadInput(
            f"partition: found {owners.dtype} {owners.shape}, expected a whole number for each of"
            f" {len(units)} units: a unit is never split"
        )
    if len(owners) and not (owners.min() >= 0 and owners.max() < clients):
        found = f"clients {owners.min()} to {owners.max()}"
        raise BadInput(f"partition: found {found}, expected 0 to {clients - 1}")
    partition = _grouped(owners.astype(np.int64), clients)
    if empty := np.flatnonzero(partition.sizes == 0).tolist():
        raise BadInput(f"partition: found no unit for client {empty[0]}, expected one at least")
    return partition


def _iid(labels: Ints, clients: int, alpha: float, rng: np.random.Generator) -> Ints:
    return rng.permutation(np.arange(len(labels), dtype=np.int64) % clients)


def _dirichlet(labels: Ints, clients: int, alpha: float, rng: np.random.Generator) -> Ints:
    owners = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        owners[mine] = _cut(len(mine), rng.dirichlet(np.full(clients, alpha)))
    return _nobody_empty(owners, clients, rng)


def _shards(labels: Ints, clients: int, alpha: float, rng: np.random.Generator) -> Ints:
    count = clients * SHARDS_PER_CLIENT
    order = np.argsort(labels, kind="stable")
    shard = np.arange(len(labels), dtype=np.int64) * count // len(labels)
    dealt = rng.permutation(np.arange(count, dtype=np.int64) % clients)
    owners = np.empty(len(labels), dtype=np.int64)
    owners[order] = dealt[shard]
    return _nobody_empty(owners, clients, rng)


def _quantity(labels: Ints, clients: int, alpha: float, rng: np.random.Generator) -> Ints:
    owners = np.empty(len(labels), dtype=np.int64)
    owners[rng.permutation(len(labels))] = _cut(len(labels), rng.dirichlet(np.full(clients, alpha)))
    return _nobody_empty(owners, clients, rng)


Dealer = Callable[[Ints, int, float, np.random.Generator], Ints]
DEALERS: dict[str, Dealer] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
    "quantity": _quantity,
}


def _by_column(config: FederationConfig, records: Records, units: UnitIndex) -> Partition:
    values = records.columns[config.column]
    names = tuple(sorted(set(values)))
    if len(names) != config.clients:
        raise BadInput(
            f"{records.where} column {config.column!r}: found {len(names)} values, "
            f"expected [federation] clients = {config.clients}"
        )
    number = {name: index for index, name in enumerate(names)}
    of_record = np.array([number[value] for value in values], dtype=np.int64)
    return _grouped(_one_owner(of_record, records, units, config.column), config.clients, names)


def _one_owner(of_record: Ints, records: Records, units: UnitIndex, column: str) -> Ints:
    """The client of each unit; BadInput where a unit's records would go to two."""
    owners = of_record[units.records[units.offsets[:-1]]]
    wrong = np.flatnonzero(of_record[units.records] != np.repeat(owners, np.diff(units.offsets)))
    if len(wrong):
        row = int(units.records[wrong[0]])
        raise BadInput(
            f"{records.place(row)} {column}: found {shown(records.columns[column][row])}, "
            "expected the value of its unit's other records: a unit is never split"
        )
    return owners


def _unit_labels(records: Records, units: UnitIndex) -> Ints:
    """The label of each unit's first record; 0 where the task has no labels."""
    if records.labels is None:
        return np.zeros(len(units), dtype=np.int64)
    return records.labels[units.records[units.offsets[:-1]]]


def _cut(count: int, shares: Sequence[float] | npt.NDArray[np.float64]) -> Ints:
    """(count,) owners 0..k-1 in runs, each as long as its share says."""
    bounds = np.round(np.cumsum(shares) * count).astype(np.int64)[:-1]
    return np.searchsorted(bounds, np.arange(count), side="right").astype(np.int64)


def _nobody_empty(owners: Ints, clients: int, rng: np.random.Generator) -> Ints:
    """Give each client that has none a unit of one that has several, drawn at random."""
    empty = np.flatnonzero(np.bincount(owners, minlength=clients) == 0)
    if not len(empty):
        return owners
    order = rng.permutation(len(owners))
    # what each owner keeps whatever happens
    _, firsts = np.unique(owners[order], return_index=True)
    spare = np.delete(order, firsts)
    owners = owners.copy()
    owners[spare[: len(empty)]] = empty
    return owners


def _grouped(owners: Ints, clients: int, names: tuple[str, ...] = ()) -> Partition:
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=clients))]).astype(
        np.int64
    )
    return Partition(offsets, np.argsort(owners, kind="stable").astype(np.int64), names)
