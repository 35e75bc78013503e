"""`fedlora-node report`: what a data protection officer asks for, signed by the node, as a page.

Everything comes from the ledger, the outbox, the refusal log and the manifests that the node itself
kept. The figures are recomputed here; a second accountant (Rényi) states its own, larger, bound
beside the first. The page's digest is in what is signed, so that no byte of either file, and no
file beside them, changes unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedlora.client.node.folder import NodeFolder, pinned_invitation
from fedlora.client.node.outbox import Outbox
from fedlora.client.node.policy import Policy
from fedlora.client.node.roster import read_peers
from fedlora.client.report.check import PAGE, REPORT, REPORT_TAG
from fedlora.client.report.page import page
from fedlora.client.report.run_facts import Body, consented_runs, federations, run_facts
from fedlora.client.service.refusal_log import read_lines, read_refusals
from fedlora.common.disk.files import now, write_atomically
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.privacy.accountant import ACCOUNTANT
from fedlora.common.privacy.modes import GUARANTEES
from fedlora.common.trust.identity import Identity, seal

ASSUMPTIONS = (
    (
        "A unit of privacy occurs at one institution only; where it occurs at several, its ε and δ"
        " add up."
    ),
    (
        "Base model, label set and configuration were chosen without looking at the private"
        " records; validation and test files are public."
    ),
    "Data sets that may hold the same persons charge the same budget of the policy.",
    "No data file was charged to a second ledger under another name or as a copy.",
    "Ledger, key and head were never all put back to an older copy together.",
    (
        "Nobody outside the institution sees how much of a processor, or for how long, the trainer"
        " uses: an answer leaves at a public tick, and that hides no more of a step's time than"
        " between two ticks."
    ),
    (
        "Noise is drawn in floating point or whole numbers as each run states; the guarantee is the"
        " mathematical mechanism's."
    ),
)
PACKAGES = ("fedlora", "flwr", "grpcio", "opacus", "torch", "transformers", "peft", "cryptography")


def write_report(
    folder: NodeFolder, policy: Policy, identity: Identity, ledger: Ledger, out: Path
) -> Mapping[str, Any]:
    """`report.json`, signed, and `report.html` in `out`; the report's body."""
    body = report_body(folder, policy, identity, ledger)
    shown = page(body).encode()
    body["page_sha256"] = hashlib.sha256(shown).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / PAGE, shown)
    write_atomically(out / REPORT, seal(identity, REPORT_TAG, body).encode())
    return body


def report_body(
    folder: NodeFolder, policy: Policy, identity: Identity, ledger: Ledger
) -> dict[str, Any]:
    """The report as a table."""
    entries = ledger.entries()
    bodies = [entry.body for entry in entries]
    runs = consented_runs(folder, bodies)
    outbox = Outbox(folder.under(policy.trainer.outbox))
    refusals, not_kept = read_refusals(folder.refusals)
    strangers = [
        {name: value for name, value in line.items() if name in ("time", "reason")}
        for path in (folder.strangers.with_suffix(".1.jsonl"), folder.strangers)
        for line in read_lines(path, "time", "reason")
    ]
    return {
        **_who(folder, policy, identity),
        "written": now(),
        "budgets": _budgets(policy, ledger, bodies),
        "federations": federations(folder, bodies),
        "runs": [run_facts(folder, outbox, bodies, digest) for digest in runs],
        # as they were told, and what the policy said; details, which may quote a record, stay in
        # the node's own log
        "refusals": refusals,
        "refusals_not_kept": not_kept,
        "strangers": strangers,
        "ledger": {
            "id": entries[0].body["id"],
            "entries": entries[-1].number,
            "head": entries[-1].hash,
        },
        "accountant": ACCOUNTANT,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "mechanisms": {
            name: each.mechanism
            for name, each in GUARANTEES.items()
            if not each.refusal(policy.limits)
        },
        "assumptions": list(ASSUMPTIONS),
        "noise_source": "the operating system's generator; no seed",
    }


def _who(folder: NodeFolder, policy: Policy, identity: Identity) -> Body:
    """Who writes, under which policy, in which federation, and whom it trusts there."""
    invitation = pinned_invitation(folder) if folder.federation.exists() else None
    return {
        "institution": policy.institution,
        "key": identity.public.text,
        "fingerprint": identity.public.fingerprint,
        "federation": "" if invitation is None else invitation.federation,
        "coordinator": "" if invitation is None else invitation.coordinator.fingerprint,
        "organisation": _organisation(folder),
        "peers": {
            name: {"organisation": peer.organisation, "fingerprint": peer.identity.fingerprint}
            for name, peer in read_peers(folder).items()
        },
        "policy_digest": policy.digest,
    }


def _organisation(folder: NodeFolder) -> str:
    """Whose node this is, as its own request says."""
    if not folder.request.exists():
        return ""
    return folder.own_request().organisation


def _budgets(policy: Policy, ledger: Ledger, bodies: list[Body]) -> list[Body]:
    """The policy's budgets, and those that it has no more, with the caps of their last run.

    What was spent of these stays spent.
    """
    former = {
        name: Budget(name, float(body["cap_epsilon"]), float(body["cap_delta"]))
        for body in bodies
        if body["kind"] == "consent" and (name := str(body["budget"])) not in policy.budgets
    }
    held = [_budget(policy, ledger, each, True) for each in policy.budgets.values()]
    return held + [_budget(policy, ledger, each, False) for each in former.values()]


def _budget(policy: Policy, ledger: Ledger, cap: Budget, in_policy: bool) -> Body:
    spent = ledger.spent(cap.name)
    return {
        "budget": cap.name,
        "in_policy": in_policy,
        "data": [name for name, data in policy.data.items() if data.budget == cap.name],
        "epsilon": cap.epsilon,
        "epsilon_spent": spent.epsilon,
        "epsilon_left": max(cap.epsilon - spent.epsilon, 0.0) if in_policy else 0.0,
        "delta": cap.delta,
        "delta_spent": spent.delta,
        "delta_left": max(cap.delta - spent.delta, 0.0) if in_policy else 0.0,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
