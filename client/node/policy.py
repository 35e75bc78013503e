"""What an institution allows, by its `node.toml`: no message, flag or environment loosens it.

Budgets have names, and each data set charges one: a file may grow or change its name, its budget
stays. The file is read through one descriptor and refused where anybody but its owner could have
written it. Its digest goes into what the node signs, so that a consent names the very policy it was
given under.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedlora.common.codec.strict import digest_of
from fedlora.common.config.schema import COUNTS, DIGEST, LAYER, NAME, OPTIONAL, OPTIONAL_PATH, PATH
from fedlora.common.config.task_names import BUILT_IN, LABELLED, LANGUAGES, TaskName, scale_labels
from fedlora.common.config.toml import (
    UNDECIDED,
    Bounds,
    Each,
    Pattern,
    Rule,
    Table,
    read_fields,
    read_table,
    shown,
)
from fedlora.common.disk.files import text_of
from fedlora.common.disk.guarded import read_guarded
from fedlora.common.errors import BadInput
from fedlora.common.ledger.ledger import Budget
from fedlora.common.ledger.subject import RECORD
from fedlora.common.secagg.cohort import DEFAULT_COHORT, SMALLEST_COHORT
from fedlora.common.trust.enrolment import NAME as INSTITUTION

MAX_POLICY_BYTES = 1 << 20
DEVICE = Pattern(r"auto|cpu|cuda(:[0-9]{1,3})?", '"auto", "cpu", "cuda" or "cuda:NUMBER"')


def _ruled(default: Any, rule: Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class BudgetPolicy:
    """What one population's records may cost over all runs and federations."""

    epsilon: float = _ruled(0.0, Bounds(0, 1e4, open_low=True))
    delta: float = _ruled(0.0, Bounds(0, 0.5, open_low=True))


@dataclass(frozen=True)
class DataPolicy:
    """A data set, what may be learnt from it, and who pays.

    Runs find theirs by task, labels and unit.
    """

    path: str = _ruled("", PATH)
    budget: str = _ruled("", NAME)
    task: str = _ruled(BUILT_IN[0], TaskName())
    labels: tuple[str, ...] = _ruled((), Each(NAME))  # the public label set, in the run's order
    unit: str = _ruled("", OPTIONAL)  # the column that names the privacy unit; empty: the record
    # one text, or the two of a pair
    text: tuple[str, ...] = field(default=("text",), metadata={"rule": Each(NAME, 1), "one": True})
    image: str = _ruled("", OPTIONAL)  # bytes, or paths from the table's folder on
    audio: str = _ruled("", OPTIONAL)
    label: str = _ruled("label", NAME)
    # a regression's public ends of what a number may be; they travel as its label set
    scale: tuple[float, ...] = _ruled((), Each(Bounds(-1e9, 1e9)))
    tokens: str = _ruled("", OPTIONAL)
    tags: str = _ruled("", OPTIONAL)
    messages: str = _ruled("", OPTIONAL)
    prompt: str = _ruled("", OPTIONAL)  # or text
    response: str = _ruled("", OPTIONAL)
    group: str = _ruled("", OPTIONAL)  # a column by whose values a run may compare groups

    @property
    def serves(self) -> tuple[str, tuple[str, ...], str]:
        """Task, labels and unit: a manifest that has the same may use these data."""
        return self.task, self.label_set, self.unit

    @property
    def label_set(self) -> tuple[str, ...]:
        """As a manifest has it."""
        return self.labels or scale_labels(self.scale)


@dataclass(frozen=True)
class Limits:
    """Bounds on every run."""

    minimum_cohort: int = _ruled(DEFAULT_COHORT, Bounds(0, 1_000_000))  # floor: checked by name
    rounds: int = _ruled(100, Bounds(1, 100_000))
    attempts: int = _ruled(200, Bounds(1, 200_000))  # of all phases together
    steps: int = _ruled(20, Bounds(1, 10_000))  # local steps of a round
    noise_multiplier: float = _ruled(0.5, Bounds(0, 1e4, open_low=True))
    delta: float = _ruled(1e-5, Bounds(0, 0.5, open_low=True))  # of one run; below 1 / units
    max_length: int = _ruled(512, Bounds(4, 32_768))
    rank: int = _ruled(64, Bounds(1, 1024))
    targets: tuple[str, ...] = _ruled((), Each(NAME))  # empty: any
    layers: tuple[int, ...] = _ruled((), Each(LAYER))  # empty: any
    offers: int = _ruled(50, Bounds(1, 100_000))  # readings of a day that nobody is charged for
    # a run takes whole steps of its budget: 60 has many divisors, so that runs which cost a half to
    # a sixth of it still fit as often as they should
    budget_steps: int = _ruled(60, Bounds(1, 1_000_000))
    allow_unnoised: bool = False
    allow_packed: bool = False  # batches in which a record's rounding depends on its company
    require_secure: bool = False  # updates leave this node under masks only
    max_colluders: int = _ruled(1, Bounds(0, 1000))  # peers that may side with the coordinator
    client_level: bool = False  # runs whose noise is shared between institutions, under masks
    shared_noise: bool = False  # likewise, for records
    honest_peers: int = _ruled(1, Bounds(1, 1000))  # then, in every sum, at least
    # noisy counts of an adapter's answers to records that may leave; empty: none
    metrics: tuple[str, ...] = _ruled((), Each(COUNTS))


@dataclass(frozen=True)
class LedgerPolicy:
    """Where the ledger lies: several node folders of one institution may share it."""

    path: str = _ruled("ledger.sqlite", Pattern(r".{1,1000}\.sqlite", "a file, NAME.sqlite"))
    marks: str = _ruled("", OPTIONAL_PATH)  # a folder for the marks of read-only data
    anchor: str = _ruled("", OPTIONAL_PATH)  # a file outside: the newest head once more


@dataclass(frozen=True)
class TrainerPolicy:
    """How the trainer is reached, and where its ledger's head lies: best on another disk."""

    listen: str = _ruled(
        "unix:trainer.sock",
        Pattern(r"unix:.{1,100}|[A-Za-z0-9.\[\]:-]{1,253}:\d{1,5}", "unix:PATH or host:port"),
    )
    group_may_ask: bool = False  # the socket's mode is 0660 instead of 0600
    head: str = _ruled("head/head.json", PATH)  # starts where the ledger lies
    outbox: str = _ruled("outbox", PATH)
    threads: int = _ruled(0, Bounds(0, 1024))
    # auto: each GPU of a kind, or the CPU; or devices by name, among which a step is divided
    device: tuple[str, ...] = field(
        default=("auto",), metadata={"rule": Each(DEVICE, shortest=1, distinct=False), "one": True}
    )
    # padded tokens that go through the model together; auto: as a short measurement finds best
    micro_batch_tokens: int = field(
        default=UNDECIDED, metadata={"rule": Bounds(1, 1 << 24), "auto": True}
    )
    answer_every: float = _ruled(5.0, Bounds(0.1, 3600))  # seconds: the first tick of an answer
    checkpointing: bool = False  # layers are computed again on the way back: slower, far smaller
    max_message_bytes: int = _ruled(64 << 20, Bounds(1 << 16, 256 << 20))
    tls_certificate: str = _ruled("", OPTIONAL_PATH)  # for host:port: mutual TLS, always
    tls_key: str = _ruled("", OPTIONAL_PATH)
    tls_clients: str = _ruled("", OPTIONAL_PATH)  # the CA that the relay's certificate comes from


@dataclass(frozen=True)
class _Plain:
    """The parts of the file whose keys are fixed."""

    institution: str = _ruled(
        "", Pattern(INSTITUTION.pattern, "lower-case letters, digits, '.' and '-'")
    )
    limits: Limits = field(default_factory=Limits)
    trainer: TrainerPolicy = field(default_factory=TrainerPolicy)
    ledger: LedgerPolicy = field(default_factory=LedgerPolicy)


@dataclass(frozen=True)
class Policy:
    """The whole of a `node.toml`; `digest` is of its bytes."""

    institution: str
    limits: Limits
    trainer: TrainerPolicy
    budgets: Mapping[str, Budget]
    data: Mapping[str, DataPolicy]
    # digest -> folder (relative ones start in the node's) or packaged model
    bases: Mapping[str, str]
    digest: str
    ledger: LedgerPolicy = field(default_factory=LedgerPolicy)

    def data_for(self, task: str, labels: tuple[str, ...], unit: str) -> str:
        """The name of the data set that serves such a run, or ""."""
        found = (name for name, each in self.data.items() if each.serves == (task, labels, unit))
        return next(found, "")


def load_policy(path: Path) -> Policy:
    """Refused where others could have written the file; BadInput lists every fault in it."""
    data = read_guarded(path, "the node's policy", MAX_POLICY_BYTES)
    text = text_of(data, path.name, "the node's policy", "utf-8-sig")
    return parse_policy(text, path.name, digest_of(data))


def parse_policy(text: str, where: str = "node.toml", digest: str = "") -> Policy:
    """The policy that `text` describes."""
    table = read_table(text, where)
    named = {name: table.values.get(name, {}) for name in ("budgets", "data", "bases")}
    plain = {name: value for name, value in table.values.items() if name not in named}
    read, found = read_fields(_Plain, Table(plain, where))
    tables: list[str] = []
    budgets = _tables(BudgetPolicy, named["budgets"], f"{where} [budgets", tables)
    data = _tables(DataPolicy, named["data"], f"{where} [data", tables)
    bases = _bases(named["bases"], where, tables)
    faults = [*found.values(), *tables]
    faults += [fault for key, fault in _limit_faults(read, where).items() if key not in found]
    if not tables:  # else what is missing there is the default of what is wrong
        faults += _data_faults(budgets, data, bases, where)
    if faults:
        raise BadInput(faults)
    return Policy(
        institution=read.institution,
        limits=read.limits,
        trainer=read.trainer,
        ledger=read.ledger,
        budgets={name: Budget(name, each.epsilon, each.delta) for name, each in budgets.items()},
        data=data,
        bases=bases,
        digest=digest or digest_of(text.encode()),
    )


def _limit_faults(read: _Plain, where: str) -> dict[str, str]:
    """What rules of single fields do not say, by `section.key`."""
    limits, trainer = read.limits, read.trainer
    faults = {}
    if not read.institution:
        faults["institution"] = (
            f'{where} institution = "": expected the name that this node enrols under'
        )
    if limits.minimum_cohort < SMALLEST_COHORT:
        faults["limits.minimum_cohort"] = (
            f"{where} [limits] minimum_cohort = {limits.minimum_cohort}: expected at least"
            f" {SMALLEST_COHORT}"
        )
    if not trainer.listen.startswith("unix:"):
        for name in ("tls_certificate", "tls_key", "tls_clients"):
            if not getattr(trainer, name):
                faults[f"trainer.{name}"] = (
                    f'{where} [trainer] {name} = "": expected a file, since listen is host:port'
                )
    return faults


def _data_faults(
    budgets: Mapping[str, BudgetPolicy],
    data: Mapping[str, DataPolicy],
    bases: Mapping[str, str],
    where: str,
) -> list[str]:
    faults = [
        f"{where} [{section}]: found none, expected at least one"
        for section, held in (("budgets", budgets), ("data", data), ("bases", bases))
        if not held
    ]
    for name, budget in budgets.items():
        for key in ("epsilon", "delta"):
            if getattr(budget, key) <= 0:
                faults.append(f"{where} [budgets.{name}] {key}: missing, expected a cap")
    seen: dict[tuple[str, tuple[str, ...], str], str] = {}
    for name, each in data.items():
        place = f"{where} [data.{name}]"
        if not each.path:
            faults.append(f"{place} path: missing, expected a file")
        if each.budget not in budgets:
            known = ", ".join(budgets)
            faults.append(f"{place} budget = {shown(each.budget)}: expected one of {known}")
        if each.task == "regression" and len(each.scale) != 2:
            faults.append(f"{place} scale: expected its public ends, two numbers")
        if each.task in LABELLED and len(each.labels) < 2:
            faults.append(f"{place} labels: expected the public label set, at least two")
        if len(each.text) > 2:
            faults.append(f"{place} text: expected one column, or the two of a pair")
        if each.task in LANGUAGES and each.labels:
            faults.append(f"{place} labels: expected none for a language model")
        if each.serves in seen:
            faults.append(f"{place}: serves the same runs as [data.{seen[each.serves]}]")
        seen[each.serves] = name
    return [*faults, *_unit_faults(data, where)]


def _unit_faults(data: Mapping[str, DataPolicy], where: str) -> list[str]:
    """A budget counts one kind of unit.

    The ε of a record and the ε of a person do not add up to that of either.
    """
    faults: list[str] = []
    first: dict[str, str] = {}
    for name, each in data.items():
        if each.unit == RECORD:  # a ledger could not tell persons from records
            faults.append(f"{where} [data.{name}] unit: expected a column of another name")
        known = first.setdefault(each.budget, name)
        if data[known].unit != each.unit:
            units = shown(each.unit or "record"), shown(data[known].unit or "record")
            faults.append(
                f"{where} [data.{name}] unit: found {units[0]}, but [data.{known}] charges"
                f" [budgets.{each.budget}] for {units[1]}, expected one unit for a budget"
            )
    return faults


T = TypeVar("T")


def _tables(cls: type[T], found: Any, where: str, faults: list[str]) -> dict[str, T]:
    """Named tables of one kind; what is wrong is added to `faults`."""
    if not isinstance(found, Mapping):
        faults.append(f"{where}]: found {shown(found)}, expected named tables, as {where}.NAME]")
        return {}
    result = {}
    for name, values in found.items():
        place = f"{where}.{name}]"
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or not isinstance(values, Mapping):
            faults.append(
                f"{place[:120]!r}: expected a table with a name of letters, digits, '_' and '-'"
            )
            continue
        result[name], inner = read_fields(cls, Table(values, place))
        faults.extend(inner.values())
    return result


def _bases(found: Any, where: str, faults: list[str]) -> dict[str, str]:
    if not isinstance(found, Mapping):
        faults.append(f'{where} [bases]: found {shown(found)}, expected "sha256:…" = "folder"')
        return {}
    for digest, folder in found.items():
        if not digest or DIGEST.fault(digest, ""):
            faults.append(
                f'{where} [bases] {shown(digest)}: expected "sha256:" and 64 hexadecimal digits'
            )
        elif not isinstance(folder, str) or PATH.fault(folder, ""):
            faults.append(
                f"{where} [bases] {digest[:20]}… = {shown(folder)}: expected a folder or a model's"
                " name"
            )
    return {str(digest): str(folder) for digest, folder in found.items()}


def policy_template(institution: str) -> str:
    """A commented `node.toml` to fill in; it allows nothing before that is done."""
    text = (Path(__file__).parent / "templates" / "node.toml").read_text(encoding="utf-8")
    return text.replace("@institution@", institution)
