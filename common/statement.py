"""What a run guarantees, in sentences that a data protection officer can read and a test can check."""

from __future__ import annotations

import math

from fedlora.common.messages import RunManifest
from fedlora.common.privacy import accountant_name

NOISE_SOURCE = "continuous Gaussian in floating point"


def privacy_statement(manifest: RunManifest, epsilon: float | None) -> list[str]:
    """The guarantee of a run that reserved `epsilon`, and what it rests on."""
    if manifest.mode == "none":
        return ["This run trained without privacy: nothing is guaranteed to anybody whose records it used."]
    if manifest.mode != "record" or epsilon is None:
        raise ValueError(f"no statement is known for mode {manifest.mode!r}")
    unit = (
        f'all records that share a value of the column "{manifest.unit}"'
        if manifest.unit
        else "a single record"
    )
    return [
        f"Each institution's updates are ({shown_epsilon(epsilon)}, {manifest.delta:g})-differentially private. "
        f"The unit is {unit}; neighbouring data sets differ by adding or removing one unit.",
        "ε covers the whole schedule that was consented to, spare attempts included, also where the run "
        f"stopped earlier. It was computed by {accountant_name()} for the sampling that ran: "
        + _phases(manifest),
        "Every step draws each unit independently at a public rate (Poisson sampling), clips each unit's gradient "
        "once, adds Gaussian noise to the sum and divides by a public number. Draws and noise come from the "
        "operating system's generator.",
        f"The noise is {NOISE_SOURCE}: the guarantee is that of the mathematical mechanism, and the last bits of "
        "floating point numbers are not covered by it.",
        "Assumed: a unit occurs at one institution only (otherwise its ε and δ add up), the base model, the label "
        "set and the configuration were chosen without looking at the private records, and validation and test "
        "files are public.",
        "Not covered: who took part and when, how long training took, and how the hyperparameters were found.",
    ]


def shown_epsilon(epsilon: float) -> str:
    """ε to three decimals, never rounded down."""
    return f"{math.ceil(epsilon * 1000 - 1e-9) / 1000:.12g}"


def _phases(manifest: RunManifest) -> str:
    parts = [
        f"phase {phase.name}, {phase.steps * phase.attempts} steps at rate {phase.sampling_rate:g} with noise "
        f"multiplier {phase.noise_multiplier:.4g}"
        for phase in manifest.phases
    ]
    return "; ".join(parts) + "."
