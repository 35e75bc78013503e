"""A manifest against a policy, field by field.

Pure, so that it can be tried on any manifest at no cost. A field without a verdict would be a field
that nobody looked at: there is one for each. What the run promises, and what that costs,
`client.consent.promise` judges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlora.client.consent.promise import (
    MOST_PHASES,
    mode_verdict,
    noise_verdict,
    promised,
    shared_noise_verdict,
    spend_verdicts,
)
from fedlora.client.consent.verdict import Verdict, at_most, beyond, least, one_of, same
from fedlora.client.node.policy import Policy
from fedlora.common.errors import BadInput
from fedlora.common.manifest.counts import Cells
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.model.state import PHASES
from fedlora.common.privacy.accountant import SMALLEST_CLIP, Spend
from fedlora.common.privacy.guarantee import Guarantee
from fedlora.common.secagg.cohort import THRESHOLD_RULE

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


def judge(
    manifest: RunManifest,
    policy: Policy,
    federation: str,
    spent: Mapping[str, Sequence[Spend]],
    reserved: Spend | None = None,
) -> list[Verdict]:
    """A verdict for each field; `spent` by budget, what each run was charged; `reserved`: what this
    run was.
    """
    guarantee, other = promised(manifest), "expected one that node.toml [bases] has"
    phases = _phase_verdicts(guarantee, policy)
    counted = _evaluation_verdicts(guarantee, policy)
    sound = all(each.allowed for each in (*phases, *counted))
    return [
        same("federation", manifest.federation, federation),
        Verdict("run", manifest.run),
        *_data_verdicts(manifest, policy),
        one_of("base_digest", manifest.base_digest, policy.bases, other),
        *_network_verdicts(manifest, policy),
        _max_length(manifest, policy),
        *phases,
        *counted,
        *spend_verdicts(guarantee, policy, spent, reserved, sound),
        least("minimum_cohort", manifest.minimum_cohort, policy.limits.minimum_cohort),
        _secure_verdict(manifest, policy),
        _batches_verdict(manifest, policy),
        _wire_verdict(manifest),
        shared_noise_verdict(guarantee, policy),
        Verdict("largest_cohort", str(manifest.largest_cohort)),  # what skellam's figures are of
        # held against the network before anything is charged
        Verdict("vector_size", str(manifest.vector_size)),
        *_free_verdicts(manifest),
    ]


def _data_verdicts(manifest: RunManifest, policy: Policy) -> list[Verdict]:
    tasks = {each.task for each in policy.data.values()}
    sets = {each.label_set for each in policy.data.values() if each.task == manifest.task}
    units = {
        each.unit
        for each in policy.data.values()
        if (each.task, each.label_set) == (manifest.task, manifest.labels)
    }
    whole = "" if manifest.labels in sets else "no data set has exactly these"
    other = "expected the unit of a [data] table of node.toml with these labels"
    return [
        one_of("task", manifest.task, tasks, "expected the task of a [data] table of node.toml"),
        Verdict("labels", f"{len(manifest.labels)} labels", whole),
        one_of("unit", manifest.unit, units, other),
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
    headed = any(phase.name == "head" for phase in manifest.phases)
    # what lies between its layers is rounded by a row's place, and no clip bounds that
    rounded = network.head_hidden and headed and promised(manifest).clip_in_step
    return [
        Verdict("network", network.variant, shape),
        at_most("network.rank", network.rank, limits.rank),
        at_most("network.alpha", network.alpha, STEEPEST * network.rank),
        at_most("network.head_scale", network.head_scale, STEEPEST),
        Verdict(
            "network.head_hidden",
            str(network.head_hidden),
            "expected 0 in a private head phase" * bool(rounded),
        ),
        Verdict(
            "network.targets", ", ".join(network.targets)[:80], beyond(targets, limits.targets)
        ),
        Verdict(
            "network.layers",
            ", ".join(map(str, network.layers)) or "all",
            f"expected some of {list(limits.layers)}" if every else beyond(layers, limits.layers),
        ),
    ]


def _phase_verdicts(guarantee: Guarantee, policy: Policy) -> list[Verdict]:
    """Rounds, attempts, steps and noise: also what makes the schedule a mechanism at all."""
    manifest, limits, phases = guarantee.manifest, policy.limits, guarantee.manifest.phases
    attempts = sum(phase.attempts for phase in manifest.accounted)
    many = "" if 1 <= len(phases) <= MOST_PHASES else "expected 1 to 16"
    verdicts = [
        mode_verdict(manifest.mode, policy),
        Verdict("phases", str(len(phases)), many),
        at_most("rounds", manifest.rounds, limits.rounds),
        at_most("attempts", attempts, limits.attempts),
    ]
    for number, phase in enumerate(phases):
        name = f"phases[{number}]"
        named = "" if phase.name in PHASES else f"expected one of {', '.join(PHASES)}"
        rounds = "" if 1 <= phase.rounds <= phase.attempts else "expected 1 to attempts"
        steps = "" if 1 <= phase.steps <= limits.steps else f"expected 1 to {limits.steps}"
        verdicts += [
            Verdict(f"{name}.name", phase.name[:40], named),
            Verdict(f"{name}.rounds", str(phase.rounds), rounds),
            Verdict(f"{name}.steps", str(phase.steps), steps),
            *_mechanism(name, phase, guarantee, policy),
        ]
    return verdicts


def _mechanism(name: str, phase: Phase, guarantee: Guarantee, policy: Policy) -> list[Verdict]:
    verdicts = []
    for field, low, high in RANGES:
        value = float(getattr(phase, field))
        allowed = low <= value <= high or (field == "head_clip" and value == 0)
        reason = "" if allowed else f"expected {low:g} to {high:g}"
        verdicts.append(Verdict(f"{name}.{field}", f"{value:g}", reason))
    known = phase.optimizer in ("sgd", "adamw")
    verdicts.append(
        Verdict(f"{name}.optimizer", phase.optimizer[:40], "" if known else "expected sgd or adamw")
    )
    field = f"{name}.noise_multiplier"
    return [*verdicts, noise_verdict(field, phase, guarantee, policy)]


def _evaluation_verdicts(guarantee: Guarantee, policy: Policy) -> list[Verdict]:
    """Whether noisy counts of a hold-out may leave; a manifest's own rules bound their terms."""
    manifest, terms = guarantee.manifest, guarantee.manifest.evaluation
    by = _groups_verdict(manifest, policy)
    if terms is None:
        return [Verdict("evaluation", "none"), by]
    found = f"counts ({', '.join(terms.counts)}) of {terms.hold_out:.2g} of the units"
    more = [each for each in terms.counts if each not in policy.limits.metrics]
    if more:
        known = ", ".join(policy.limits.metrics) or "none"
        few = f"expected counts that [limits] metrics has: {known}"
        return [Verdict("evaluation", found, few), by]
    try:
        Cells.of(manifest)
    except BadInput as error:
        return [Verdict("evaluation", found, error.faults[0]), by]
    phase = terms.phase
    noise = noise_verdict("evaluation.noise_multiplier", phase, guarantee, policy)
    return [Verdict("evaluation", found), by, noise]


def _groups_verdict(manifest: RunManifest, policy: Policy) -> Verdict:
    """Groups are of the column that the owner of the data named for it, and of no other."""
    asked, name = manifest.groups, policy.data_for(manifest.task, manifest.labels, manifest.unit)
    if asked is None:
        return Verdict("groups", "none")
    found = f"{len(asked.values)} of {asked.column[:80]}"
    if manifest.evaluation is None:
        return Verdict("groups", found, "expected none without an evaluation")
    other = "expected the column that the [data] table of node.toml has as group"
    return Verdict(
        "groups", found, "" if name and policy.data[name].group == asked.column else other
    )


def _free_verdicts(manifest: RunManifest) -> list[Verdict]:
    """What a policy need not bound: it changes neither what leaves nor what it costs."""
    digests = ("spec_digest", "projection_digest")
    names = (*digests, "quantised", "strategy", "participation", "version")
    seed = Verdict("seed", str(manifest.seed), "" if manifest.seed >= 0 else "expected at least 0")
    return [seed, *(Verdict(name, str(getattr(manifest, name))[:80]) for name in names)]


def _max_length(manifest: RunManifest, policy: Policy) -> Verdict:
    """At least what any record fits into: a record left out would say how long it is."""
    found = manifest.max_length
    verdict = at_most("max_length", found, policy.limits.max_length)
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
    if len(terms.update_bounds) != len(manifest.accounted):
        return Verdict(
            "secure",
            found,
            f"expected an update bound for each of {len(manifest.accounted)} phases",
        )
    return Verdict("secure", found)


def _batches_verdict(manifest: RunManifest, policy: Policy) -> Verdict:
    """In a packed batch a hostile adapter can make one record move what others add."""
    denied = manifest.batches == "packed" and not policy.limits.allow_packed
    reason = "expected fixed; allow_packed is false" if denied else ""
    return Verdict("batches", manifest.batches, reason)


def _wire_verdict(manifest: RunManifest) -> Verdict:
    """Rounding comes after the noise; under masks there is nothing that it could be of."""
    masked = manifest.secure is not None and manifest.wire != "float32"
    return Verdict("wire", manifest.wire, "expected float32 under masks" if masked else "")
