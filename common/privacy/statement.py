"""What a run guarantees, in sentences that a data protection officer reads and a test checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, Context
from typing import Any

from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.accountant import accountant_name, charged_epsilon, stated_epsilon

# At each stage of an attempt: who was there before it, and who after it.
DROP_OUTS = (
    ("keys", "asked", "cohort"),
    ("shares", "cohort", "dealt"),
    ("input", "dealt", "members"),
    ("confirm", "members", "confirmed"),
    ("open", "confirmed", "opened"),
)
NOISE_SOURCE = "continuous Gaussian in floating point"
SKELLAM_SOURCE = "Skellam on whole numbers, shared between the institutions"


def noise_source(manifest: RunManifest) -> str:
    """What the noise of a private run is."""
    return SKELLAM_SOURCE if manifest.mode == "client" else NOISE_SOURCE


def unit_of(manifest: RunManifest) -> str:
    """Whom ε is stated for."""
    return "institution" if manifest.mode == "client" else manifest.unit or "record"


def privacy_statement(manifest: RunManifest, epsilon: float | None) -> list[str]:
    """The guarantee of a run that reserved `epsilon`, and what it rests on."""
    if manifest.mode == "none":
        return [
            "This run trained without privacy: nothing is guaranteed to anybody whose records it"
            " used."
        ]
    if manifest.mode == "client" and epsilon is not None:
        return _client_statement(manifest)
    if manifest.mode != "record" or epsilon is None:
        raise ValueError(f"no statement is known for mode {manifest.mode!r}")
    unit = (
        f'all records that share a value of the column "{manifest.unit}"'
        if manifest.unit
        else "a single record"
    )
    return [
        (
            f"Each institution's updates are ({shown_epsilon(epsilon)},"
            f" {shown_delta(manifest.delta)})-differentially private. The unit is {unit};"
            " neighbouring data sets differ by adding or removing one unit."
        ),
        "ε covers the whole schedule that was consented to, spare attempts included, also where"
        f" the run stopped earlier. It was computed by {accountant_name()} for the sampling that"
        " ran: " + _phases(manifest),
        (
            "Every step draws each unit independently at a public rate (Poisson sampling), clips"
            " each unit's gradient once, adds Gaussian noise to the sum and divides by a public"
            " number. Draws and noise come from the operating system's generator."
        ),
        (
            f"The noise is {NOISE_SOURCE}: the guarantee is that of the mathematical mechanism, and"
            " the last bits of floating point numbers are not covered by it."
        ),
        (
            "Assumed: a unit occurs at one institution only (otherwise its ε and δ add up), the"
            " base model, the label set and the configuration were chosen without looking at the"
            " private records, and validation and test files are public."
        ),
        (
            "Not covered: who took part and when, how long training took, and how the"
            " hyperparameters were found."
        ),
    ]


def _client_statement(manifest: RunManifest) -> list[str]:
    """ε is computed from the manifest: a budget was charged the larger one, of a record."""
    secure, terms = manifest.secure, manifest.skellam
    if secure is None or terms is None:
        raise ValueError("no statement is known for mode 'client' without its terms")
    releases = "; ".join(
        f"phase {phase.name}, {phase.attempts} sums of {count} coordinates with noise multiplier "
        f"{phase.noise_multiplier:.4g} and clip {phase.clip:g}"
        for phase, count in zip(manifest.phases, terms.coordinates, strict=True)
    )
    return [
        (
            "The sums of updates that left the institutions are"
            f" ({shown_epsilon(stated_epsilon(manifest))},"
            f" {shown_delta(manifest.delta)})-differentially private. The unit is an institution,"
            " with all its records; neighbours differ in whether its update is added or zero, in a"
            " cohort that is fixed."
        ),
        (
            "One record more or less at an institution changes its update to any other: for it the"
            f" same run is ({shown_epsilon(charged_epsilon(manifest))},"
            f" {shown_delta(manifest.delta)})-differentially private, and that is what budgets are"
            " charged."
        ),
        (
            "ε covers every attempt that was consented to, also where the run stopped earlier. It"
            " was computed with the Rényi bound of the Skellam mechanism (Agarwal, Kairouz and Liu"
            f" 2021): {releases}."
        ),
        (
            "Each institution trains without noise, clips its whole update, rounds it to whole"
            " numbers and adds a share of integer noise from the operating system's generator. The"
            f" noise is {SKELLAM_SOURCE}: an update by itself is protected by its mask, not by ε."
        ),
        (
            "This holds only with secure aggregation whose sums have at least t = ⌊2n/3⌋ + 1 of"
            f" the n institutions of a round, of which at most c = {secure.max_colluders} side with"
            " the coordinator or leave their noise out: any t - c others, at least"
            f" {terms.carriers}, carry all of the noise. It is computational, as masks are."
        ),
        (
            "Assumed: base model, label set and configuration were chosen without looking at the"
            " private records, and validation and test files are public."
        ),
        (
            "Not covered: who took part and when, how long training took, and how the"
            " hyperparameters were found."
        ),
    ]


def secure_statement(manifest: RunManifest) -> list[str]:
    """What secure aggregation adds, and on what conditions; nothing of updates sent in clear."""
    terms = manifest.secure
    if terms is None:
        return []
    return [
        (
            "Updates were aggregated securely: the coordinator learnt sums of at least"
            f" {manifest.minimum_cohort} institutions' updates and, as long as at most"
            f" {terms.max_colluders} of them sided with it, no single one. With n institutions in a"
            " round, t = ⌊2n/3⌋ + 1 of them had to stay to the end."
        ),
        (
            "Secure aggregation is no differential privacy: a sum can say much about its parts. ε"
            " is what bounds that."
        ),
    ]


def secure_summary(
    manifest: RunManifest, sums: Sequence[Mapping[str, Any]], liars: Iterable[str] = ()
) -> dict[str, Any] | None:
    """How a run was aggregated, from what was noted of each sum that was or may have been learnt.

    A sum that did not count in the end is one of them. `liars` were proven before there was a sum.
    None where the run was not aggregated securely.
    """
    if manifest.secure is None:
        return None
    return {
        "minimum_cohort": manifest.minimum_cohort,
        "colluders": manifest.secure.max_colluders,
        "threshold_rule": manifest.secure.threshold,
        "cohort": _range(sums, "cohort"),
        "threshold": _range(sums, "threshold"),
        "smallest_sum": _range(sums, "members")[0],
        "dropouts": {
            stage: sum(_lost(each, before, after) for each in sums)
            for stage, before, after in DROP_OUTS
        },
        "liars": sorted({*liars, *(name for each in sums for name in each["liars"])}),
        "suspected": sorted({name for each in sums for name in each.get("suspected", ())}),
        "sums": len(sums),
        "bits": manifest.secure.bits,
    }


def _lost(each: Mapping[str, Any], before: str, after: str) -> int:
    """Drop-outs of a stage; none are known where a coordinator stopped before it knew them."""
    return 0 if each[after] is None else max(each[before] - each[after], 0)


def _range(sums: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    values = [each[name] for each in sums] or [0]
    return [min(values), max(values)]


def shown_epsilon(epsilon: float) -> str:
    """ε to three decimals, never rounded down."""
    return f"{math.ceil(epsilon * 1000 - 1e-9) / 1000:.12g}"


def shown_left(epsilon: float) -> str:
    """What is left of an ε, to three decimals, never rounded up."""
    return f"{math.floor(epsilon * 1000 + 1e-9) / 1000:.12g}"


def shown_delta(delta: float) -> str:
    """δ to six digits, never rounded down."""
    return f"{float(Context(prec=6, rounding=ROUND_CEILING).create_decimal(repr(delta))):g}"


def _phases(manifest: RunManifest) -> str:
    parts = [
        f"phase {phase.name}, {phase.steps * phase.attempts} steps at rate {phase.sampling_rate:g}"
        f" with noise multiplier {phase.noise_multiplier:.4g}"
        for phase in manifest.phases
    ]
    return "; ".join(parts) + "."
