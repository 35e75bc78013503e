"""From a configuration to the manifest: the public schedule, with its noise calibrated.

σ is the smallest that keeps the whole schedule, all attempts of all phases, within ε.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from fedlora.common.config.schema import Config
from fedlora.common.manifest.manifest import Network, Phase, RunManifest, SecureTerms
from fedlora.common.privacy.calibration import Schedule
from fedlora.common.privacy.guarantee import Guarantee
from fedlora.common.privacy.modes import guarantee_named
from fedlora.common.secagg.cohort import THRESHOLD_RULE
from fedlora.common.secagg.ring import Encoding


def make_manifest(
    config: Config,
    labels: tuple[str, ...],
    base_digest: str,
    spec_digest: str,
    projection_digest: str = "",
    cache: Path | None = None,
    federation: str = "simulation",
    minimum_cohort: int = 1,
    moved: Mapping[str, int] | None = None,
) -> RunManifest:
    """A new run of `config`. Calibration takes seconds and is cached in `cache`.

    `moved`: by a phase's name, how many coordinates it moves; shared noise is of these.
    """
    guarantee = guarantee_named(config.privacy.mode)
    schedule = guarantee.calibrated(
        public_phases(config), config.privacy, config.aggregation, moved, cache
    )
    secure = _secure_terms(config, guarantee, schedule) if config.aggregation.secure else None
    return RunManifest(
        federation=federation,
        run=secrets.token_hex(16),
        task=config.model.task,
        labels=labels,
        base_digest=base_digest,
        spec_digest=spec_digest,
        projection_digest=projection_digest,
        max_length=config.model.max_length,
        mode=config.privacy.mode,
        unit=config.data.unit,
        epsilon=config.privacy.epsilon if guarantee.private else 0.0,
        delta=config.privacy.delta if guarantee.private else 0.0,
        strategy=config.aggregation.strategy,
        participation=config.federation.participation,
        minimum_cohort=minimum_cohort if secure is None else config.aggregation.minimum_cohort,
        seed=config.seed,
        network=Network.of(config.model, config.lora),
        phases=schedule.phases,
        secure=secure,
        skellam=schedule.skellam,
    )


def _secure_terms(config: Config, guarantee: type[Guarantee], schedule: Schedule) -> SecureTerms:
    """The ring that holds a sum of all institutions, and its noise; BadInput where none does."""
    bounds = tuple(guarantee.coordinate_bound(phase) for phase in schedule.phases)
    members, noise = config.federation.clients, schedule.member_noise()
    ring = Encoding.fitting(1, max(bounds), schedule.levels, members, noise)
    return SecureTerms(
        threshold=THRESHOLD_RULE,
        max_colluders=config.aggregation.max_colluders,
        epoch_attempts=config.aggregation.epoch_rounds,
        bits=ring.bits,
        levels=ring.levels,
        update_bounds=bounds,
    )


def public_phases(config: Config) -> tuple[Phase, ...]:
    """The phases with noise 0: where `head_rounds` asks, the head alone; then everything."""
    head, rounds = config.training.head_rounds, config.federation.rounds
    phases = (_head_phase(config, head), _adapter_phase(config, rounds - head))
    return tuple(phase for phase in phases if phase.rounds > 0)


def _head_phase(config: Config, rounds: int) -> Phase:
    training = config.training
    ratio = training.head_sampling_rate / training.sampling_rate
    return Phase(
        name="head",
        rounds=rounds,
        attempts=rounds + config.federation.spare_rounds,
        steps=training.head_steps,
        sampling_rate=training.head_sampling_rate,
        expected_units=training.head_expected_units or training.expected_units * ratio,
        noise_multiplier=0.0,
        clip=config.privacy.head_phase_clip,
        head_clip=0.0,
        optimizer=training.head_optimizer,
        learning_rate=training.head_learning_rate,
        carry_optimizer=training.carry_optimizer,
        proximal_mu=training.proximal_mu,
    )


def _adapter_phase(config: Config, rounds: int) -> Phase:
    training = config.training
    return Phase(
        name="adapter",
        rounds=rounds,
        attempts=rounds + config.federation.spare_rounds,
        steps=training.steps,
        sampling_rate=training.sampling_rate,
        expected_units=float(training.expected_units),
        noise_multiplier=0.0,
        clip=config.privacy.clip,
        head_clip=config.privacy.head_clip,
        optimizer=training.optimizer,
        learning_rate=training.learning_rate,
        carry_optimizer=training.carry_optimizer,
        proximal_mu=training.proximal_mu,
    )
