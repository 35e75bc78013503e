"""A manifest against a policy, field by field.

Pure, so that it can be tried on any manifest at no cost. Projected ε is computed here from the
manifest's own schedule, whatever the manifest states, and held against what the budget has left. A
field without a verdict would be a field that nobody looked at: there is one for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fedlora.client.node.policy import Policy
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget, exceeded
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.privacy.accountant import (
    SMALLEST_CLIP,
    Mechanism,
    Spend,
    charged_epsilon,
    epsilon_of,
    history_of,
    releases_of,
    stated_epsilon,
)
from fedlora.common.privacy.skellam import MOST_NOISE
from fedlora.common.privacy.statement import shown_epsilon, shown_left
from fedlora.common.protocol.messages import one_line
from fedlora.common.secagg.cohort import THRESHOLD_RULE

SLACK = 1 + 1e-6  # relative: the last bits of an ε differ between machines
MOST_PHASES = 16
# alpha / rank, and the scale of pooled features: with bounded adapters nothing overflows
STEEPEST = 64.0
SHORTEST = 4  # tokens of a record, as in a configuration
RANGES = (
    ("sampling_rate", 1e-9, 1.0),
    ("clip", SMALLEST_CLIP, 1e6),
    ("head_clip", SMALLEST_CLIP, 1e6),  # or 0: one clip for all
    ("expected_units", 1e-3, 1e9),
    ("learning_rate", 1e-12, 1e3),
    ("proximal_mu", 0.0, 1e3),
)


@dataclass(frozen=True)
class Verdict:
    """What the policy says to one field of a manifest; `reason` is "" where it is allowed.

    `note` is for the node's own operator, and goes to nobody else: budgets, and what other runs had
    of them. The rest is what a coordinator chose, and is one printable line: it ends on the
    operator's terminal.
    """

    field: str
    found: str
    reason: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("found", "reason", "note"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    @property
    def allowed(self) -> bool:
        return not self.reason

    @property
    def denial(self) -> str:
        return f"manifest {self.field} = {self.found}: {self.reason}"


class Denied(Refused):
    """What a policy does not allow, for anybody; `detail` has the notes, for the operator alone."""

    def __init__(self, denied: Sequence[Verdict]) -> None:
        super().__init__("; ".join(each.denial for each in denied))
        self.detail = "; ".join(
            each.denial + (f" ({each.note})" if each.note else "") for each in denied
        )


def judge(
    manifest: RunManifest,
    policy: Policy,
    federation: str,
    spent: Mapping[str, Spend],
    reserved: Spend | None = None,
) -> list[Verdict]:
    """A verdict for each field; `spent` by budget, `reserved`: what this run has of it already."""
    phases, other = _phase_verdicts(manifest, policy), "expected one that node.toml [bases] has"
    return [
        _same("federation", manifest.federation, federation),
        Verdict("run", manifest.run),
        *_data_verdicts(manifest, policy),
        _one_of("base_digest", manifest.base_digest, policy.bases, other),
        *_network_verdicts(manifest, policy),
        _max_length(manifest, policy),
        *phases,
        *_spend_verdicts(manifest, policy, spent, reserved, all(each.allowed for each in phases)),
        _least("minimum_cohort", manifest.minimum_cohort, policy.limits.minimum_cohort),
        _secure_verdict(manifest, policy),
        _skellam_verdict(manifest),
        *_free_verdicts(manifest),
    ]


def allow(verdicts: list[Verdict]) -> None:
    """Denied with every reason, unless all fields are allowed."""
    denied = [each for each in verdicts if not each.allowed]
    if denied:
        raise Denied(denied)


def projected(manifest: RunManifest) -> Spend:
    """What the whole schedule costs a budget, all attempts; ε is infinite if nothing bounds it."""
    if manifest.mode == "client":
        return Spend(charged_epsilon(manifest), manifest.delta)
    if manifest.mode != "record":
        return Spend(0.0, 0.0)
    return Spend(_epsilon(manifest), manifest.delta)


def _epsilon(manifest: RunManifest) -> float:
    return _composed(tuple(history_of(manifest)), manifest.delta)


@lru_cache(maxsize=1024)
def _composed(history: tuple[Mechanism, ...], delta: float) -> float:
    """Once for all runs of one schedule: a composition takes a tenth of a second."""
    return epsilon_of(history, delta)


def _data_verdicts(manifest: RunManifest, policy: Policy) -> list[Verdict]:
    tasks = {each.task for each in policy.data.values()}
    sets = {each.labels for each in policy.data.values() if each.task == manifest.task}
    units = {
        each.unit
        for each in policy.data.values()
        if (each.task, each.labels) == (manifest.task, manifest.labels)
    }
    whole = "" if manifest.labels in sets else "no data set has exactly these"
    other = "expected the unit of a [data] table of node.toml with these labels"
    return [
        _one_of("task", manifest.task, tasks, "expected the task of a [data] table of node.toml"),
        Verdict("labels", f"{len(manifest.labels)} labels", whole),
        _one_of("unit", manifest.unit, units, other),
    ]


def _network_verdicts(manifest: RunManifest, policy: Policy) -> list[Verdict]:
    network, limits = manifest.network, policy.limits
    try:
        network.configs("base")
        shape = ""
    except BadInput as error:
        shape = error.faults[0]
    targets = [name for name in network.targets if limits.targets and name not in limits.targets]
    layers = [layer for layer in network.layers if limits.layers and layer not in limits.layers]
    every = bool(limits.layers) and not network.layers
    return [
        Verdict("network", network.variant, shape),
        _at_most("network.rank", network.rank, limits.rank),
        _at_most("network.alpha", network.alpha, STEEPEST * network.rank),
        _at_most("network.head_scale", network.head_scale, STEEPEST),
        Verdict(
            "network.targets", ", ".join(network.targets)[:80], _beyond(targets, limits.targets)
        ),
        Verdict(
            "network.layers",
            ", ".join(map(str, network.layers)) or "all",
            f"expected some of {list(limits.layers)}" if every else _beyond(layers, limits.layers),
        ),
    ]


def _phase_verdicts(manifest: RunManifest, policy: Policy) -> list[Verdict]:
    """Rounds, attempts, steps and noise: also what makes the schedule a mechanism at all."""
    limits, phases = policy.limits, manifest.phases
    attempts = sum(phase.attempts for phase in phases)
    many = "" if 1 <= len(phases) <= MOST_PHASES else "expected 1 to 16"
    verdicts = [
        Verdict("mode", manifest.mode, _mode(manifest, policy)),
        Verdict("phases", str(len(phases)), many),
        _at_most("rounds", manifest.rounds, limits.rounds),
        _at_most("attempts", attempts, limits.attempts),
    ]
    for number, phase in enumerate(phases):
        name = f"phases[{number}]"
        named = "" if phase.name in ("head", "adapter") else "expected head or adapter"
        rounds = "" if 1 <= phase.rounds <= phase.attempts else "expected 1 to attempts"
        steps = "" if 1 <= phase.steps <= limits.steps else f"expected 1 to {limits.steps}"
        verdicts += [
            Verdict(f"{name}.name", phase.name[:40], named),
            Verdict(f"{name}.rounds", str(phase.rounds), rounds),
            Verdict(f"{name}.steps", str(phase.steps), steps),
            *_mechanism(name, phase, manifest, policy),
        ]
    return verdicts


def _mechanism(name: str, phase: Phase, manifest: RunManifest, policy: Policy) -> list[Verdict]:
    verdicts = []
    for field, least, most in RANGES:
        value = float(getattr(phase, field))
        allowed = least <= value <= most or (field == "head_clip" and value == 0)
        reason = "" if allowed else f"expected {least:g} to {most:g}"
        verdicts.append(Verdict(f"{name}.{field}", f"{value:g}", reason))
    known = phase.optimizer in ("sgd", "adamw")
    verdicts.append(
        Verdict(f"{name}.optimizer", phase.optimizer[:40], "" if known else "expected sgd or adamw")
    )
    noise, least = phase.noise_multiplier, policy.limits.noise_multiplier
    reason = note = ""
    if manifest.mode != "none" and not noise <= MOST_NOISE:
        reason = f"expected at most {MOST_NOISE:g}"
    elif manifest.mode != "none" and noise < least:
        reason, note = f"expected at least {least:g}", _noise_note(phase, manifest, policy)
    return [*verdicts, Verdict(f"{name}.noise_multiplier", f"{noise:g}", reason, note)]


def _noise_note(phase: Phase, manifest: RunManifest, policy: Policy) -> str:
    """What the least noise would do for a phase that has too little of it."""
    name = policy.data_for(manifest.task, manifest.labels, manifest.unit)
    # nobody may keep the node busy with sums
    if not name or manifest.mode != "record" or len(manifest.phases) > MOST_PHASES:
        return ""
    least, budget = policy.limits.noise_multiplier, policy.budgets[policy.data[name].budget]
    try:
        step = Mechanism(phase.sampling_rate, least, phase.steps)
        fit = rounds_that_fit(step, budget.epsilon, manifest.delta, policy.limits.attempts)
    except BadInput:
        return ""
    return f"with {least:g}, {fit} attempts of this phase fit {budget.epsilon:g} of ε"


def rounds_that_fit(step: Mechanism, epsilon: float, delta: float, most: int) -> int:
    """The most rounds of `step.steps` steps that cost at most ε, up to `most`."""

    def fits(rounds: int) -> bool:
        return _composed((replace(step, steps=step.steps * rounds),), delta) <= epsilon

    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _spend_verdicts(
    manifest: RunManifest,
    policy: Policy,
    spent: Mapping[str, Spend],
    reserved: Spend | None,
    sound: bool,
) -> list[Verdict]:
    if manifest.mode not in ("record", "client"):
        return [
            Verdict("epsilon", f"{manifest.epsilon:g}"),
            Verdict("delta", f"{manifest.delta:g}"),
        ]
    delta = _at_most("delta", manifest.delta, policy.limits.delta)
    if manifest.delta <= 0:
        delta = replace(delta, reason="expected > 0")
    name = policy.data_for(manifest.task, manifest.labels, manifest.unit)
    if manifest.mode == "client":
        sound = sound and _skellam_verdict(manifest).allowed
    if not name or not sound or not delta.allowed:
        reason = "can't be projected before the other fields are allowed"
        return [Verdict("epsilon", f"{manifest.epsilon:g}", reason), delta]
    shared = manifest.mode == "client"
    cost = stated_epsilon(manifest) if shared else _epsilon(manifest)
    charged = charged_epsilon(manifest) if shared else cost
    budget = policy.budgets[policy.data[name].budget]
    found = f"{manifest.epsilon:g}"
    if not math.isfinite(charged):
        return [
            Verdict("epsilon", found, "its schedule has no bound on ε that is known to hold"),
            delta,
        ]
    used = spent.get(budget.name, Spend(0.0, 0.0))
    note = _cost_note(budget, used.epsilon, charged, reserved)
    if cost > manifest.epsilon * SLACK:
        return [Verdict("epsilon", found, f"its schedule costs {shown_epsilon(cost)}", note), delta]
    # what was let in before reserves nothing more
    over = exceeded(budget, used, Spend(charged, manifest.delta)) if reserved is None else ""
    reason = (
        f"the budget does not suffice: it would be charged ε {shown_epsilon(charged)}"
        if over
        else ""
    )
    return [Verdict("epsilon", found, reason, over or note), delta]


def _cost_note(budget: Budget, used: float, charged: float, reserved: Spend | None) -> str:
    held = 0.0 if reserved is None else reserved.epsilon  # is among what is used
    return (
        f"costs {shown_epsilon(charged)}{' (reserved before)' * (reserved is not None)}; of"
        f" {budget.epsilon:g} in {budget.name}, {shown_epsilon(used - held)} went to other runs and"
        f" {shown_left(budget.epsilon - used + held - charged)} would be left"
    )


def _free_verdicts(manifest: RunManifest) -> list[Verdict]:
    """What a policy need not bound: it changes neither what leaves nor what it costs."""
    names = ("spec_digest", "projection_digest", "strategy", "participation", "version")
    seed = Verdict("seed", str(manifest.seed), "" if manifest.seed >= 0 else "expected at least 0")
    return [seed, *(Verdict(name, str(getattr(manifest, name))[:80]) for name in names)]


def _max_length(manifest: RunManifest, policy: Policy) -> Verdict:
    """At least what any record fits into: a record left out would say how long it is."""
    found = manifest.max_length
    verdict = _at_most("max_length", found, policy.limits.max_length)
    return (
        verdict if found >= SHORTEST else replace(verdict, reason=f"expected at least {SHORTEST}")
    )


def _secure_verdict(manifest: RunManifest, policy: Policy) -> Verdict:
    """Colluders and smallest cohort are the node's own: `client.secagg` checks them each epoch."""
    terms = manifest.secure
    if terms is None:
        denied = "expected secure aggregation; require_secure is true"
        reason = denied if policy.limits.require_secure else ""
        return Verdict("secure", "updates are sent in clear", reason)
    found = f"sums of {terms.bits}-bit words, t = {terms.threshold}"
    if terms.threshold != THRESHOLD_RULE:
        return Verdict("secure", found, f"expected t = {THRESHOLD_RULE}")
    if len(terms.update_bounds) != len(manifest.phases):
        return Verdict(
            "secure", found, f"expected an update bound for each of {len(manifest.phases)} phases"
        )
    return Verdict("secure", found)


def _skellam_verdict(manifest: RunManifest) -> Verdict:
    """Whether the terms of shared noise are whole.

    `client.secagg.masked_run` holds the cohort and the adapter to them.
    """
    terms = manifest.skellam
    if manifest.mode != "client":
        reason = "" if terms is None else 'expected none but in mode "client"'
        return Verdict(
            "skellam", "no shared noise" if terms is None else "terms of shared noise", reason
        )
    try:
        releases_of(manifest)
    except BadInput as error:
        return Verdict("skellam", "terms of shared noise", error.faults[0])
    carriers = 0 if terms is None else terms.carriers
    return Verdict("skellam", f"noise carried by {carriers} honest institutions at least")


def _mode(manifest: RunManifest, policy: Policy) -> str:
    if manifest.mode == "record":
        return ""
    if manifest.mode == "none":
        denied = "updates would leave without noise; allow_unnoised is false"
        return "" if policy.limits.allow_unnoised else denied
    if manifest.mode == "client":
        denied = "its noise is shared with others; client_level is false"
        return "" if policy.limits.client_level else denied
    return "expected record, client or none"


def _same(field: str, found: str, expected: str) -> Verdict:
    return Verdict(field, found[:80], "" if found == expected else f"expected {expected}")


def _one_of(field: str, found: str, known: set[str] | Mapping[str, str], reason: str) -> Verdict:
    return Verdict(field, found[:80] or '""', "" if found in known else reason)


def _at_most(field: str, found: float, most: float) -> Verdict:
    return Verdict(field, f"{found:g}", "" if found <= most else f"expected at most {most:g}")


def _least(field: str, found: int, least: int) -> Verdict:
    return Verdict(field, str(found), "" if found >= least else f"expected at least {least}")


def _beyond(extra: list[str] | list[int], known: tuple[object, ...]) -> str:
    return f"expected some of {list(known)}" if extra else ""
