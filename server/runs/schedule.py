"""From a configuration to the manifest: the public schedule, with its noise calibrated.

σ is the smallest that keeps the whole schedule, all attempts of all phases, within ε. A head phase
may use `head_epsilon_share` of ε by itself; the adapter phase then takes what the composition
leaves.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.common.config.schema import Config
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Network, Phase, RunManifest, SecureTerms, SkellamTerms
from fedlora.common.privacy.accountant import Mechanism
from fedlora.common.privacy.calibration import calibrate, smallest_noise
from fedlora.common.privacy.skellam import Release, epsilon_of_releases
from fedlora.common.secagg.cohort import THRESHOLD_RULE, threshold
from fedlora.common.secagg.ring import Encoding
from fedlora.server.rounds.norm_bound import coordinate_bound

# of a coordinate: as fine as float32 for a value at the bound; 511 institutions in 32 bits
LEVELS = 1 << 22
# of the clip: what rounding may add to the sensitivity where large noise leaves fewer levels
ROUNDING = 0.1


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

    `moved`: by a phase's name, how many coordinates it moves; mode "client" noises these.
    """
    private, phases = config.privacy.mode != "none", public_phases(config)
    skellam, levels = None, LEVELS
    if config.privacy.mode == "record":
        phases = _calibrated(config, phases, cache)
    elif config.privacy.mode == "client":
        phases, skellam, levels = _shared_noise(config, phases, moved)
    secure = _secure_terms(config, phases, skellam, levels) if config.aggregation.secure else None
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
        epsilon=config.privacy.epsilon if private else 0.0,
        delta=config.privacy.delta if private else 0.0,
        strategy=config.aggregation.strategy,
        participation=config.federation.participation,
        minimum_cohort=minimum_cohort if secure is None else config.aggregation.minimum_cohort,
        seed=config.seed,
        network=Network.of(config.model, config.lora),
        phases=phases,
        secure=secure,
        skellam=skellam,
    )


def _secure_terms(
    config: Config, phases: tuple[Phase, ...], skellam: SkellamTerms | None, levels: int
) -> SecureTerms:
    """The ring that holds a sum of all institutions, and its noise; BadInput where none does."""
    bounds = tuple(coordinate_bound(phase, config.privacy.mode) for phase in phases)
    noise = 0.0
    if skellam is not None:
        releases = _releases(phases, skellam.coordinates, levels)
        noise = max(math.sqrt(each.share(skellam.carriers)) for each in releases)
    ring = Encoding.fitting(1, max(bounds), levels, config.federation.clients, noise)
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


def _shared_noise(
    config: Config, phases: tuple[Phase, ...], moved: Mapping[str, int] | None
) -> tuple[tuple[Phase, ...], SkellamTerms, int]:
    """Phases with the noise of a sum, how it is shared, and the levels.

    One release an attempt, no amplification. The more noise, the fewer levels of a clip are needed,
    and the fewer are possible: a share is drawn exactly up to a bound. So they are the largest
    power of two with which every phase's share can be drawn.
    """
    if moved is None or not config.aggregation.secure:
        raise BadInput(
            '[privacy] mode = "client": expected [aggregation] secure = true, and what each phase'
            " moves"
        )
    coordinates, levels = tuple(moved[phase.name] for phase in phases), LEVELS
    carriers = threshold(config.aggregation.minimum_cohort) - config.aggregation.max_colluders
    while math.sqrt(max(coordinates)) / 2 <= ROUNDING * levels:
        done = _with_shared_noise(config, phases, coordinates, levels)
        if not any(each.beyond(carriers) for each in _releases(done, coordinates, levels)):
            return done, SkellamTerms(coordinates, carriers), levels
        levels //= 2
    raise BadInput(
        f"[privacy] epsilon = {config.privacy.epsilon:g}: needs noise that with {max(coordinates)}"
        " coordinates can't be drawn as whole numbers; expected a larger epsilon, or fewer rounds"
    )


def _with_shared_noise(
    config: Config, phases: tuple[Phase, ...], coordinates: tuple[int, ...], levels: int
) -> tuple[Phase, ...]:
    privacy, done = config.privacy, list[Phase]()
    for phase, count in zip(phases, coordinates, strict=True):
        share = 1.0 if phase is phases[-1] else privacy.head_epsilon_share
        spent, one = (
            _releases(done, coordinates, levels),
            Release(1.0, levels, count, phase.attempts),
        )
        sigma = smallest_noise(
            lambda noise, spent=spent, one=one: epsilon_of_releases(  # type: ignore[misc]
                [*spent, replace(one, noise_multiplier=noise)], privacy.delta
            ),
            share * privacy.epsilon,
        )
        done.append(replace(phase, noise_multiplier=sigma))
    return tuple(done)


def _releases(phases: Sequence[Phase], coordinates: Sequence[int], levels: int) -> list[Release]:
    """Of the first phases, in order."""
    pairs = zip(phases, coordinates, strict=False)
    return [
        Release(phase.noise_multiplier, levels, count, phase.attempts) for phase, count in pairs
    ]


def _calibrated(config: Config, phases: tuple[Phase, ...], cache: Path | None) -> tuple[Phase, ...]:
    done: list[Phase] = []
    spent: list[Mechanism] = []
    for phase in phases:
        last = phase is phases[-1]
        share = 1.0 if last else config.privacy.head_epsilon_share
        steps = phase.steps * phase.attempts
        sigma = calibrate(
            spent,
            phase.sampling_rate,
            steps,
            share * config.privacy.epsilon,
            config.privacy.delta,
            cache,
        )
        spent.append(Mechanism(phase.sampling_rate, sigma, steps))
        done.append(replace(phase, noise_multiplier=sigma))
    return tuple(done)
