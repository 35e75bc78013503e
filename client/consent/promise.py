"""What a run promises, against a policy: may it, is its noise enough, and does its price fit?

Projected ε is computed here from the manifest's own schedule, whatever the manifest states, and
held against what the budget has left. Of a mode that is none, nothing is computed: it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlora.client.consent.verdict import Verdict, at_most
from fedlora.client.node.policy import Policy
from fedlora.common.errors import BadInput
from fedlora.common.ledger.budget import Budget, Total, beyond, total_of
from fedlora.common.manifest.manifest import Phase, RunManifest
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.figures import exact, shown_epsilon, shown_left
from fedlora.common.privacy.guarantee import SLACK, Guarantee
from fedlora.common.privacy.modes import EXPECTED, GUARANTEES
from fedlora.common.privacy.skellam import MOST_NOISE
from fedlora.common.privacy.unprotected import Unprotected

MOST_PHASES = 16


def promised(manifest: RunManifest) -> Guarantee:
    """A mode that is none promises nothing: `mode_verdict` refuses it, and the rest is judged."""
    return GUARANTEES.get(manifest.mode, Unprotected)(manifest)


def mode_verdict(mode: str, policy: Policy) -> Verdict:
    """Whether the policy allows what a run of this mode promises."""
    known = GUARANTEES.get(mode)
    reason = f"expected {EXPECTED}" if known is None else known.refusal(policy.limits)
    return Verdict("mode", mode, reason)


def noise_verdict(field: str, phase: Phase, guarantee: Guarantee, policy: Policy) -> Verdict:
    """Whether a phase has at least the noise that the policy asks for, and no more than counts."""
    noise, least = phase.noise_multiplier, policy.limits.noise_multiplier
    reason = note = ""
    if guarantee.private:
        if not noise <= MOST_NOISE:
            reason = f"expected at most {MOST_NOISE:g}"
        elif noise < least:
            reason, note = f"expected at least {least:g}", _noise_note(phase, guarantee, policy)
    return Verdict(field, f"{noise:g}", reason, note)


def _noise_note(phase: Phase, guarantee: Guarantee, policy: Policy) -> str:
    """What the least noise would do for a phase that has too little of it."""
    budget, least = _budget(guarantee.manifest, policy), policy.limits.noise_multiplier
    # nobody may keep the node busy with sums
    if budget is None or len(guarantee.manifest.phases) > MOST_PHASES:
        return ""
    try:
        fit = guarantee.attempts_within(phase, least, budget.epsilon, policy.limits.attempts)
    except BadInput:
        return ""
    if fit is None:
        return ""
    return f"with {least:g}, {fit} attempts of this phase fit {budget.epsilon:g} of ε"


def spend_verdicts(
    guarantee: Guarantee,
    policy: Policy,
    spent: Mapping[str, Sequence[Spend]],
    reserved: Spend | None,
    sound: bool,
) -> list[Verdict]:
    """Of ε and δ. `sound`: whether the phases are mechanisms; `spent` is by budget, what each run
    was charged, and `reserved` what this very run was.
    """
    manifest, claim = guarantee.manifest, f"{guarantee.manifest.epsilon:g}"
    if not guarantee.private:
        return [Verdict("epsilon", claim), Verdict("delta", f"{manifest.delta:g}")]
    delta = at_most("delta", manifest.delta, policy.limits.delta)
    if manifest.delta <= 0:
        delta = replace(delta, reason="expected > 0")
    sound = sound and shared_noise_verdict(guarantee, policy).allowed
    budget = _budget(manifest, policy)
    if budget is None or not sound or not delta.allowed:
        reason = "can't be projected before the other fields are allowed"
        return [Verdict("epsilon", claim, reason), delta]
    charges = spent.get(budget.name, ())
    return [_epsilon_verdict(guarantee, budget, charges, reserved, policy), delta]


def _epsilon_verdict(
    guarantee: Guarantee,
    budget: Budget,
    charges: Sequence[Spend],
    reserved: Spend | None,
    policy: Policy,
) -> Verdict:
    claimed, cost = guarantee.manifest.epsilon, guarantee.stated_epsilon()
    charged, found = guarantee.charged_epsilon(), f"{claimed:g}"
    if not math.isfinite(charged):
        return Verdict("epsilon", found, "its schedule has no bound on ε that is known to hold")
    used = total_of(charges)
    note = _cost_note(budget, used, charged, reserved)
    if cost > claimed * SLACK:
        return Verdict("epsilon", found, f"its schedule costs {shown_epsilon(cost)}", note)
    # what was let in before reserves nothing more
    steps = policy.limits.budget_steps
    over = _beyond(budget, charges, guarantee.charge(), steps) if reserved is None else ""
    reason = (
        f"the budget does not suffice: it would be charged ε {shown_epsilon(charged)}"
        if over
        else ""
    )
    return Verdict("epsilon", found, reason, over or note)


def _beyond(budget: Budget, charges: Sequence[Spend], more: Spend, steps: int) -> str:
    """Why a run does not fit beside the runs that were charged, or "".

    Each takes whole steps of the budget, its cost rounded up, so the answer depends on the others
    by how many steps they take in all: whoever offers and starts runs of any price learns that
    number, and no more. They never take fewer than they cost, so no cap is passed.
    """
    for name, cap, costs, asked in (
        ("ε", budget.epsilon, [each.epsilon for each in charges], more.epsilon),
        ("δ", budget.delta, [each.delta for each in charges], more.delta),
    ):
        step = exact(cap) / steps
        taken = sum(math.ceil(exact(each) / step) for each in costs)
        needed = math.ceil(exact(asked) / step)
        if taken + needed > steps:
            return beyond(budget, total_of(charges), more) or (
                f"budget {budget.name}: {name} needs {needed} steps of 1/{steps} of {cap:.6g}, each"
                f" run's rounded up, of which {max(0, steps - taken)} are left"
            )
    return ""


def _cost_note(budget: Budget, used: Total, charged: float, reserved: Spend | None) -> str:
    # what is reserved for this run is among what is used
    others = used.epsilon - exact(0.0 if reserved is None else reserved.epsilon)
    return (
        f"costs {shown_epsilon(charged)}{' (reserved before)' * (reserved is not None)}; of"
        f" {budget.epsilon:g} in {budget.name}, {shown_epsilon(others)} went to other runs and"
        f" {shown_left(exact(budget.epsilon) - others - exact(charged))} would be left"
    )


def shared_noise_verdict(guarantee: Guarantee, policy: Policy) -> Verdict:
    """Whether the terms of shared noise are whole, and rely on no fewer peers than the policy says.

    `client.secagg.masked_run` holds the cohort and the adapter to them.
    """
    try:
        found = guarantee.shared_noise()
    except BadInput as error:
        return Verdict("skellam", "terms of shared noise", error.faults[0])
    peers, least = guarantee.honest_peers, policy.limits.honest_peers
    few = peers is not None and peers < least
    reason = f"expected at least {least} honest peers in any sum; found {peers}" if few else ""
    return Verdict("skellam", found, reason)


def _budget(manifest: RunManifest, policy: Policy) -> Budget | None:
    """What pays for a run with these data; None where the policy has no such data."""
    name = policy.data_for(manifest.task, manifest.labels, manifest.unit)
    return policy.budgets[policy.data[name].budget] if name else None
