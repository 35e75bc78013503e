"""What coordinator and institutions say to each other, as frozen values without a transport.

A `RunManifest` fixes everything public about a run; its digest names the run. A `RoundPlan` is
bound to that digest, to one attempt and to the digest of the adapter it starts from. An `Update`
answers exactly one plan. Canonical bytes are UTF-8 JSON with sorted keys and no white space; floats
are Python's shortest round trip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fedlora.common.codec.strict import build, digest_of, from_canonical, json_table, to_canonical
from fedlora.common.config.schema import (
    ALL_LINEAR,
    COUNTS,
    NAME,
    LoraConfig,
    ModelConfig,
    is_expression,
)
from fedlora.common.config.toml import AUTO, Bounds, Choice, Each, check_rules, shown
from fedlora.common.errors import BadInput
from fedlora.common.manifest.turns import Mask, leaving, turns
from fedlora.common.model.state import COUNTED, AdapterSpec

# 2: words have a head phase, and pairs are read apart. A manifest says the earliest version that
# knows all that it asks for: a node of an earlier one declines it when it is offered, before its
# ledger reserves anything.
VERSION = 2
BATCHES = Choice(("fixed", "packed"))
QUANTISED = Choice(("", "int8", "nf4"))
WIRE = Choice(("float32", "bfloat16"))
POSITIVE = {"rule": Each(Bounds(0, math.inf, open_low=True), distinct=False)}


@dataclass(frozen=True)
class Phase:
    """A stretch of rounds that share one mechanism and one local recipe. All fields are public.

    A step draws every privacy unit with probability `sampling_rate`, clips each unit's gradient to
    L2 norm `clip` (or, where `head_clip` is not 0, head and LoRA coordinates separately to
    `head_clip` and `clip`), sums, adds Gaussian noise and divides by `expected_units`.
    `noise_multiplier` is relative to the total L2 sensitivity, whatever the groups: Σ (C_g / s_g)²
    = 1 / noise_multiplier².
    """

    # "head": only the head trains, on cached features; "lora": all but the head; "adapter": both
    name: str
    rounds: int
    attempts: int  # rounds + spare rounds: what the noise is calibrated for
    steps: int  # local steps of a round
    sampling_rate: float
    expected_units: float
    noise_multiplier: float  # 0 where the run is not private
    clip: float
    head_clip: float
    optimizer: str  # the node's: "sgd" or "adamw"
    learning_rate: float
    carry_optimizer: bool
    proximal_mu: float


@dataclass(frozen=True)
class EvaluationTerms:
    """What is counted of the released adapter on hold-outs, and how noisily. All fields are public.

    An institution's answer is its counts over `expected_units`, with Gaussian noise of
    `noise_multiplier`: a unit moves the counts by an L2 norm of at most 1 (`manifest.counts`).
    """

    hold_out: float = field(metadata={"rule": Bounds(0, 0.5, open_low=True)})  # share of units
    attempts: int = field(metadata={"rule": Bounds(1, 100)})  # each is a release of its own
    # of all hold-outs together, about: no institution's counts are more than that
    expected_units: float = field(metadata={"rule": Bounds(1, 1e9)})
    noise_multiplier: float = field(metadata={"rule": Bounds(0, 1e6)})  # 0 without privacy
    counts: tuple[str, ...] = field(metadata={"rule": Each(COUNTS, shortest=1)})

    @property
    def phase(self) -> Phase:
        """As the accountant, the ledger and the masks take it: one step over every unit, no draw.

        Whether a unit is held out is not counted on: each is charged for training and for this.
        """
        return Phase(
            name=COUNTED,
            rounds=1,
            attempts=self.attempts,
            steps=1,
            sampling_rate=1.0,
            expected_units=self.expected_units,
            noise_multiplier=self.noise_multiplier,
            clip=1.0,
            head_clip=0.0,
            optimizer="sgd",
            learning_rate=1.0,
            carry_optimizer=False,
            proximal_mu=0.0,
        )


@dataclass(frozen=True)
class Groups:
    """Whom counts are compared between: those whose records have one of `values` in `column`."""

    column: str
    values: tuple[str, ...] = field(metadata={"rule": Each(NAME, shortest=1)})


@dataclass(frozen=True)
class SecureTerms:
    """How updates are masked and added where a run aggregates securely.

    `minimum_cohort` is the manifest's own. A coordinate saturates at its phase's bound and has
    `levels` steps from 0 to it, in words of `bits` bits.
    """

    threshold: str  # the rule: t follows from the cohort, nobody chooses it
    # beside the coordinator; a node assumes its own number, and may refuse this one
    max_colluders: int
    epoch_attempts: int  # for which keys and shares are exchanged ahead
    bits: int
    levels: int
    update_bounds: tuple[float, ...] = field(metadata=POSITIVE)  # one for each phase


@dataclass(frozen=True)
class SkellamTerms:
    """What shared noise rests on, beside the secure terms and each phase's clip and noise.

    The noise multiplier is that of a sum: each institution adds its variance over (t -
    max_colluders), with the t of the cohort that it finds. In mode "client" the clip is of a whole
    update and equals its phase's update bound.
    """

    # that a phase moves, and noises: one number for each phase
    coordinates: tuple[int, ...] = field(metadata=POSITIVE)
    # t - max_colluders of the smallest cohort: honest institutions in any sum, at least
    carriers: int


@dataclass(frozen=True)
class AdapterLayout:
    """Where LoRA's matrices lie in a base, and which head is on it; fields as configured."""

    pooling: str
    pooled_layers: tuple[int, ...]
    head_hidden: int
    head_scale: float
    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]  # empty: all
    variant: str

    def configs(self, base: str, where: str = "manifest network") -> tuple[ModelConfig, LoraConfig]:
        """The configuration that builds it on the base at `base`; BadInput where none could."""
        found = {each.name: getattr(self, each.name) for each in fields(self)} | {"base": base}
        model, lora = (
            {name: value for name, value in found.items() if name in _names(cls)}
            for cls in (ModelConfig, LoraConfig)
        )
        built = ModelConfig(**model), LoraConfig(**lora)
        faults = [fault for each in built for fault in check_rules(each, where)]
        faults += [
            f"{where} targets: found {shown(target)}, expected names of layers"
            for target in self.targets
            if target in (AUTO, ALL_LINEAR) or is_expression(target)
        ]
        if faults:
            raise BadInput(faults)
        return built


@dataclass(frozen=True)
class Network(AdapterLayout):
    """What a node needs, beside the base, to build a run's network; fields as configured."""

    projection: int
    kernel_directions: int

    @classmethod
    def of(cls, model: ModelConfig, lora: LoraConfig) -> Network:
        """As it is configured."""
        return cls(**taken_from(cls, model, lora))


@dataclass(frozen=True)
class RunManifest:
    """Everything public about a run; a changed field is a new run."""

    federation: str
    run: str  # random, so that one configuration run twice is two runs and is charged twice
    task: str
    labels: tuple[str, ...]
    base_digest: str
    spec_digest: str
    projection_digest: str  # of the frozen map below the head; "" where there is none
    max_length: int
    mode: str  # "record", "shared-record", "client" or "none"
    unit: str  # the column that names the privacy unit; "" is the record
    epsilon: float  # of the whole schedule; 0 where the run is not private
    delta: float
    strategy: str
    participation: float
    minimum_cohort: int
    seed: int
    network: Network
    phases: tuple[Phase, ...]
    secure: SecureTerms | None = None  # None: updates are sent in clear
    skellam: SkellamTerms | None = None  # where noise is shared, and there alone
    # what a step's records are computed in (`common.model.shapes`); fixed before it could be chosen
    batches: str = field(default="fixed", metadata={"unwritten": "fixed", "rule": BATCHES})
    # what an update is rounded to, after its noise, as it leaves (`common.protocol.vectors`)
    wire: str = field(default="float32", metadata={"unwritten": "float32", "rule": WIRE})
    # "int8" or "nf4": how coarsely each institution keeps the base's frozen matrices
    quantised: str = field(default="", metadata={"unwritten": "", "rule": QUANTISED})
    # institutions of a round, at most: what an own part of shared noise is worth follows from it; 0
    # where that is not said
    largest_cohort: int = field(default=0, metadata={"unwritten": 0, "rule": Bounds(0, 1000)})
    # after the last round; None: nothing is held out
    evaluation: EvaluationTerms | None = field(default=None, metadata={"unwritten": None})
    groups: Groups | None = field(default=None, metadata={"unwritten": None})  # that it counts by
    # coordinates of an adapter that travels in parts (`common.protocol.vector_parts`); 0 where one
    # message takes it
    vector_size: int = field(default=0, metadata={"unwritten": 0, "rule": Bounds(0, 1 << 28)})
    version: int = 1

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return to_canonical(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> RunManifest:
        """BadInput unless these are the canonical bytes of a manifest of a version known here."""
        return _of_known_version(from_canonical(cls, data, "manifest"))

    @classmethod
    def from_json(cls, data: bytes) -> RunManifest:
        """From JSON in whatever spelling, for files that a person may have touched."""
        return _of_known_version(build(cls, json_table(data, "manifest"), "manifest"))

    @property
    def digest(self) -> str:
        """`sha256:` and the hash of its bytes: the run's name."""
        return digest_of(self.to_bytes())

    @property
    def rounds(self) -> int:
        """Of all phases."""
        return sum(phase.rounds for phase in self.phases)

    @property
    def accounted(self) -> tuple[Phase, ...]:
        """All that touches data, in its order: the phases, then the evaluation if there is one."""
        return self.phases if self.evaluation is None else (*self.phases, self.evaluation.phase)

    def evaluates(self, phase: int) -> bool:
        """Whether that index of `accounted` is the evaluation's."""
        return self.evaluation is not None and phase == len(self.phases)

    def phase_of(self, round_number: int) -> int:
        """Index in `accounted` of what round `round_number` (from 1) belongs to."""
        last = 0
        for index, phase in enumerate(self.accounted):
            last += phase.rounds
            if 1 <= round_number <= last:
                return index
        raise BadInput(f"round: found {round_number}, expected 1 to {last}")

    def recipe_of(self, round_number: int) -> Phase:
        """The phase of a round, named by what that round moves of it."""
        index = self.phase_of(round_number)
        phase, before = self.accounted[index], sum(each.rounds for each in self.phases[:index])
        moves = turns(phase.name, self.network.variant)
        return replace(phase, name=moves[(round_number - before - 1) % len(moves)])

    def leaving(self, spec: AdapterSpec, round_number: int) -> Mask:
        """(size,) true where a coordinate of a round's updates leaves its institution."""
        return leaving(spec, self.recipe_of(round_number).name, self.network.variant)


def taken_from(cls: type, model: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """The fields of `cls` that a configuration has, by name."""
    found = {name: getattr(each, name) for each in (lora, model) for name in _names(type(each))}
    return {name: found[name] for name in _names(cls) & found.keys()}


def _names(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}


def version_of(network: Network, phases: Iterable[Phase]) -> int:
    """The earliest version that knows such a network's phases."""
    words = network.pooling == "words" and any(each.name == "head" for each in phases)
    return 2 if words or network.pooling == "pairs" else 1


def _of_known_version(manifest: RunManifest) -> RunManifest:
    if not 1 <= manifest.version <= VERSION:
        raise BadInput(f"manifest version: found {manifest.version}, expected at most {VERSION}")
    return manifest
