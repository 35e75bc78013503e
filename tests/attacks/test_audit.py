"""An empirical audit: what an attacker who sees everything learns of a unit, and what is stated.

Two data sets differ by one unit of twelve records. At rate 1 a step is its clipped sum and noise:
the sum is computed once by the real code, the noise drawn anew for each trial, and each released
update is projected on what the unit adds. How well a threshold tells the two apart bounds the μ of
Gaussian differential privacy from below (Dong, Roth and Su 2022; Nasr et al. 2023), and that an ε.
It stays below what the accountant states, and above it for each bug that is planted here.

    python -m tests.attacks.test_audit BASE [--trials 30000]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import optimize, stats

from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.sampling import micro_batches
from fedlora.client.training.step import ClipGroups, GradientSum, PerSampleGradients, private_mean
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.data.records import Records, unit_groups
from fedlora.common.manifest.manifest import Phase
from fedlora.common.model.features import FeatureCache
from fedlora.common.model.network import build_model
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.accountant import Mechanism, epsilon_of
from fedlora.common.privacy.randomness import OsRandom
from fedlora.common.tasks.classification import SequenceClassification

SIGMA, DELTA = 0.5, 1e-5
LEVEL = 1e-6  # of each of two bounds: a sound mechanism fails here in one run of 500,000
FAST, LONG = 1_500, 30_000  # trials with the unit, and as many without
STATED = epsilon_of([Mechanism(1.0, SIGMA, 1)], DELTA)
Floats = npt.NDArray[np.float64]
Plant = Callable[["Audit", pytest.MonkeyPatch], None]


@dataclass(frozen=True, eq=False)
class Audit:
    """One step of the real `LocalTraining` on a tiny model, with and without the unit."""

    training: LocalTraining
    data: tuple[ClientData, ClientData]  # without the unit, and with it
    state: AdapterState
    phase: Phase

    @classmethod
    def of(cls, base: Path, phase: str) -> Audit:
        """The unit's gradient is well above the clip, so that what passes the clip is seen."""
        settings = ModelConfig(base=str(base), pooling="mean")
        model = build_model(settings, LoraConfig(rank=2), SequenceClassification(("a", "b")), 3)
        people = [f"p{n}" for n in range(8)] + ["one more"] * 12
        texts = [f"w{n} w{n + 1} good" for n in range(8)] + [f"w{n} bad it was" for n in range(12)]
        labels = np.array([n % 2 for n in range(8)] + [1] * 12, dtype=np.int64)
        sides = []
        for count in (8, 20):
            records = Records(texts[:count], None, labels[:count], people[:count], {}, "audit")
            encoded = model.task.encode(records, model.tokenizer, 16)
            sides.append(ClientData(f"{count}", encoded, unit_groups(people[:count])))
        training = LocalTraining(PerSampleGradients(model), FeatureCache(model), 40)
        clip = 0.05
        step = Phase(phase, 1, 1, 1, 1.0, 1.0, SIGMA, clip, 0.0, "sgd", 1.0, False, 0.0)
        return cls(training, (sides[0], sides[1]), model.state(), step)

    def sums(self) -> tuple[Floats, Floats]:
        """The noiseless step on either side, as the code makes it."""
        quiet = replace(self.phase, noise_multiplier=1e-12)
        without, with_it = (self._released(data, quiet) for data in self.data)
        return without, with_it

    def trials(self, count: int, patch: pytest.MonkeyPatch) -> tuple[Floats, Floats]:
        """Released updates on the direction of what the unit adds; each sum is computed once."""
        without, with_it = self.sums()
        direction = (with_it - without) / np.linalg.norm(with_it - without)
        kept: dict[str, GradientSum] = {}
        real = {name: getattr(owner, name) for owner, name in self._owners()}

        def once(name: str) -> Callable[..., GradientSum]:
            def remembered(*given: Any, **named: Any) -> GradientSum:
                key = next(
                    side.owner
                    for side in self.data
                    if any(each is side or each is side.encoded for each in given)
                )
                if key not in kept:
                    kept[key] = real[name](*given, **named)
                return kept[key]

            return remembered

        for owner, name in self._owners():
            patch.setattr(owner, name, once(name))
        found = [
            np.array([self._released(data, self.phase) @ direction for _ in range(count)])
            for data in self.data
        ]
        return found[0], found[1]

    def _owners(self) -> tuple[tuple[object, str], ...]:
        return (self.training, "_head_sum"), (self.training.gradients, "clipped_sum")

    def _released(self, data: ClientData, phase: Phase) -> Floats:
        result = self.training.update(data, phase, self.state, {}, OsRandom(), private=True)
        return -result.delta.astype(np.float64)


def epsilon_below(without: Floats, with_it: Floats) -> float:
    """The ε at DELTA that the trials prove; the threshold is chosen on one half of them."""
    half = len(without) // 2
    threshold = (without[:half].mean() + with_it[:half].mean()) / 2
    wrong = (int((without[half:] > threshold).sum()), int((with_it[half:] <= threshold).sum()))
    rates = [stats.beta.ppf(1 - LEVEL, each + 1, len(without) - half - each) for each in wrong]
    mu = -float(stats.norm.ppf(rates[0]) + stats.norm.ppf(rates[1]))
    return epsilon_of_gaussian(mu) if mu > 0 else 0.0


def epsilon_of_gaussian(mu: float) -> float:
    """Of μ-GDP at DELTA (Balle and Wang 2018)."""

    def excess(epsilon: float) -> float:
        high = stats.norm.cdf(mu / 2 - epsilon / mu)
        low = stats.norm.logcdf(-mu / 2 - epsilon / mu)
        return float(high - np.exp(epsilon + low) - DELTA)

    return 0.0 if excess(0.0) < 0 else float(optimize.brentq(excess, 0.0, 500.0))


def half_noise(audit: Audit, patch: pytest.MonkeyPatch) -> None:
    def quieter(total: Any, groups: Any, noise: float, *rest: Any) -> Any:
        return private_mean(total, groups, noise / 2, *rest)

    patch.setattr("fedlora.client.training.local.private_mean", quieter)


def no_clip(audit: Audit, patch: pytest.MonkeyPatch) -> None:
    gradients = audit.training.gradients

    def unclipped(data: Any, units: Any, drawn: Any, groups: Any, tokens: int, _: bool) -> Any:
        return gradients.plain_sum(data, micro_batches(units, drawn, data.lengths, tokens))

    patch.setattr(gradients, "clipped_sum", unclipped)


def clip_a_record(audit: Audit, patch: pytest.MonkeyPatch) -> None:
    """Each record of a unit, as in micro-batches that end a unit too soon."""
    gradients = audit.training.gradients
    real = gradients.clipped_sum

    def each_by_itself(data: Any, units: Any, drawn: Any, *rest: Any) -> Any:
        return real(data, unit_groups(None, len(data)), np.arange(len(data)), *rest)

    patch.setattr(gradients, "clipped_sum", each_by_itself)


def one_tensor_unclipped(audit: Audit, patch: pytest.MonkeyPatch) -> None:
    gradients = audit.training.gradients
    real = gradients.clipped_sum

    def partly(data: Any, units: Any, drawn: Any, groups: ClipGroups, tokens: int, _: bool) -> Any:
        total = real(data, units, drawn, groups, tokens)
        plain = gradients.plain_sum(data, micro_batches(units, drawn, data.lengths, tokens))
        places = [place for _, place in gradients.model.spec.slices()]
        place = next(each for each in places if plain.vector[each].any())
        total.vector[place] = plain.vector[place]
        return total

    patch.setattr(gradients, "clipped_sum", partly)


BUGS: dict[str, Plant] = {
    "half the noise": half_noise,
    "no clip": no_clip,
    "a clip for each record": clip_a_record,
    "one tensor unclipped": one_tensor_unclipped,
}


def audited(base: Path, phase: str, trials: int, plant: Plant | None = None) -> float:
    """The ε that an attacker proves."""
    with pytest.MonkeyPatch.context() as patch:
        audit = Audit.of(base, phase)
        if plant is not None:
            plant(audit, patch)
        return epsilon_below(*audit.trials(trials, patch))


@pytest.mark.parametrize("phase", ["head", "adapter"])
def test_an_honest_step_tells_no_more_than_is_stated(tiny_bert: Path, phase: str) -> None:
    assert 0.5 * STATED < audited(tiny_bert, phase, FAST) <= STATED


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(tiny_bert: Path, bug: str) -> None:
    assert audited(tiny_bert, "adapter", FAST, BUGS[bug]) > STATED


@pytest.mark.attacks
@pytest.mark.parametrize("phase", ["head", "adapter"])
def test_an_honest_step_at_the_reviews_length(tiny_bert: Path, phase: str) -> None:
    assert 0.85 * STATED < audited(tiny_bert, phase, LONG) <= STATED


@pytest.mark.attacks
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_at_the_reviews_length(tiny_bert: Path, bug: str) -> None:
    assert audited(tiny_bert, "adapter", LONG, BUGS[bug]) > STATED


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("--trials", type=int, default=LONG)
    asked = parser.parse_args()
    print(f"stated: ε {STATED:.2f} at δ = {DELTA:g}, σ = {SIGMA:g}")
    for phase in ("head", "adapter"):
        print(f"honest {phase}: {audited(asked.base, phase, asked.trials):.2f}", flush=True)
    for name, plant in BUGS.items():
        print(f"{name}: {audited(asked.base, 'adapter', asked.trials, plant):.2f}", flush=True)


if __name__ == "__main__":
    main()
