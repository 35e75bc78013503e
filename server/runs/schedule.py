"""From the terms of a run to its manifest: the public schedule, with its noise calibrated.

σ is the smallest that keeps the whole schedule, all attempts of all phases, within ε.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora.common.config.parts import Terms
from fedlora.common.config.schema import EvaluationConfig
from fedlora.common.config.task_names import CLASSIFIED
from fedlora.common.manifest.counts import LOSS, RIGHT
from fedlora.common.manifest.manifest import (
    EvaluationTerms,
    Groups,
    Network,
    Phase,
    RunManifest,
    SecureTerms,
    version_of,
)
from fedlora.common.privacy.calibration import Asked, Schedule
from fedlora.common.privacy.guarantee import Guarantee
from fedlora.common.privacy.modes import guarantee_asked
from fedlora.common.protocol.vector_parts import vector_size
from fedlora.common.secagg.cohort import THRESHOLD_RULE
from fedlora.common.secagg.ring import Encoding


@dataclass(frozen=True)
class NetworkFacts:
    """What is known of a network once it is built: everything of a manifest that it decides."""

    task: str
    labels: tuple[str, ...]
    max_length: int
    network: Network
    base_digest: str
    spec_digest: str
    projection_digest: str  # "" where there is no projection
    # coordinates that each phase moves, by its name: shared noise is of these
    moved: Mapping[str, int]
    quantised: str = ""  # what the base's frozen matrices are kept as, where that is learnt with


def make_manifest(
    terms: Terms,
    facts: NetworkFacts,
    cache: Path | None = None,
    federation: str = "simulation",
    minimum_cohort: int = 1,
) -> RunManifest:
    """A new run on `terms`. Calibration takes seconds and is cached in `cache`."""
    privacy, asked, many = terms.privacy, terms.aggregation, terms.federation.clients
    guarantee = guarantee_asked(privacy)
    wanted = Asked(privacy, asked, facts.moved, cache, many, terms.evaluation)
    schedule = guarantee.calibrated(public_phases(terms), wanted)
    evaluation = _evaluation_terms(terms, facts.task, schedule)
    secure = _secure_terms(terms, guarantee, schedule, evaluation) if asked.secure else None
    return RunManifest(
        federation=federation,
        run=secrets.token_hex(16),
        task=facts.task,
        labels=facts.labels,
        base_digest=facts.base_digest,
        spec_digest=facts.spec_digest,
        projection_digest=facts.projection_digest,
        max_length=facts.max_length,
        mode=guarantee.name,
        unit=terms.unit,
        epsilon=privacy.epsilon if guarantee.private else 0.0,
        delta=privacy.delta if guarantee.private else 0.0,
        strategy=asked.strategy,
        participation=terms.federation.participation,
        minimum_cohort=minimum_cohort if secure is None else asked.minimum_cohort,
        seed=terms.seed,
        network=facts.network,
        phases=schedule.phases,
        secure=secure,
        skellam=schedule.skellam,
        batches=terms.training.batches if guarantee.clip_in_step else "fixed",
        wire=terms.federation.wire,
        quantised=facts.quantised,
        largest_cohort=schedule.largest_cohort,
        evaluation=evaluation,
        groups=_groups(terms.evaluation),
        vector_size=vector_size(facts.moved["adapter"]),
        version=version_of(facts.network, schedule.phases),
    )


def _groups(asked: EvaluationConfig) -> Groups | None:
    """Whom counts are compared between."""
    return Groups(asked.group, asked.groups) if asked.hold_out and asked.groups else None


def _evaluation_terms(terms: Terms, task: str, schedule: Schedule) -> EvaluationTerms | None:
    """What is counted after the last round; None where nothing is held out."""
    asked = terms.evaluation
    if not asked.hold_out:
        return None
    counts = asked.counts or (RIGHT if task in CLASSIFIED else LOSS,)
    expected = max(1.0, asked.hold_out * terms.federation.units)
    noise = schedule.evaluation_noise
    return EvaluationTerms(asked.hold_out, asked.attempts, expected, noise, counts)


def _secure_terms(
    terms: Terms, guarantee: type[Guarantee], schedule: Schedule, evaluation: EvaluationTerms | None
) -> SecureTerms:
    """The ring that holds a sum of all institutions, and its noise; BadInput where none does."""
    released = schedule.phases if evaluation is None else (*schedule.phases, evaluation.phase)
    bounds = tuple(guarantee.coordinate_bound(phase) for phase in released)
    members, noise = terms.federation.clients, schedule.member_noise
    ring = Encoding.fitting(1, max(bounds), schedule.levels, members, noise)
    return SecureTerms(
        threshold=THRESHOLD_RULE,
        max_colluders=terms.aggregation.max_colluders,
        epoch_attempts=terms.aggregation.epoch_rounds,
        bits=ring.bits,
        levels=ring.levels,
        update_bounds=bounds,
    )


def public_phases(terms: Terms) -> tuple[Phase, ...]:
    """The phases with noise 0: where `head_rounds` asks, the head alone; then everything."""
    head, rounds = terms.training.head_rounds, terms.federation.rounds
    phases = (_head_phase(terms, head), _adapter_phase(terms, rounds - head))
    return tuple(phase for phase in phases if phase.rounds > 0)


def _head_phase(terms: Terms, rounds: int) -> Phase:
    training = terms.training
    ratio = training.head_sampling_rate / training.sampling_rate
    return Phase(
        name="head",
        rounds=rounds,
        attempts=rounds + terms.federation.spare_rounds,
        steps=training.head_steps,
        sampling_rate=training.head_sampling_rate,
        expected_units=training.head_expected_units or training.expected_units * ratio,
        noise_multiplier=0.0,
        clip=terms.privacy.head_phase_clip,
        head_clip=0.0,
        optimizer=training.head_optimizer,
        learning_rate=training.head_learning_rate,
        carry_optimizer=training.carry_optimizer,
        proximal_mu=training.proximal_mu,
    )


def _adapter_phase(terms: Terms, rounds: int) -> Phase:
    training = terms.training
    return Phase(
        name="adapter" if training.moves == "both" else "lora",
        rounds=rounds,
        attempts=rounds + terms.federation.spare_rounds,
        steps=training.steps,
        sampling_rate=training.sampling_rate,
        expected_units=float(training.expected_units),
        noise_multiplier=0.0,
        clip=terms.privacy.clip,
        head_clip=terms.privacy.head_clip,
        optimizer=training.optimizer,
        learning_rate=training.learning_rate,
        carry_optimizer=training.carry_optimizer,
        proximal_mu=training.proximal_mu,
    )
