"""`fedlora-node report`: what a data protection officer asks for, signed by the node, as a page.

Everything comes from the ledger, the outbox, the refusal log and the manifests that the node itself
kept. The figures are recomputed here; a second accountant (Rényi) states its own, larger, bound
beside the first. The page's digest is in what is signed, so that no byte of either file, and no
file beside them, changes unnoticed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedlora.client.consent.offer import kept_manifest
from fedlora.client.node.enrolment import pinned_invitation
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.outbox import Outbox
from fedlora.client.node.policy import Policy
from fedlora.client.node.roster import read_peers
from fedlora.client.report.page import page
from fedlora.client.service.refusals import read_lines, read_refusals
from fedlora.common.disk.files import write_atomically
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.accountant import accountant_name, history_of, renyi_epsilon
from fedlora.common.privacy.statement import (
    noise_source,
    privacy_statement,
    secure_statement,
    unit_of,
)
from fedlora.common.protocol.messages import one_line
from fedlora.common.trust.identity import Identity, Signed
from fedlora.common.trust.sealed import seal

Body = dict[str, Any]  # of an entry of the ledger
Release = tuple[int, int, int]  # round, attempt, bytes
REPORT_TAG = "fedlora-node-report-1"
REPORT, PAGE = "report.json", "report.html"
MECHANISMS = {
    "record": "Poisson-subsampled Gaussian, per-unit clip",
    "client": "clip of the whole update, Skellam noise shared under secure aggregation",
    "none": "none: updates leave without noise",
}
NEIGHBOURS = {
    "record": "data sets that differ by adding or removing one unit",
    "client": (
        "cohorts of which one institution's update is there or zero; a budget is charged for data"
        " sets that differ by one record"
    ),
    "none": "none: nothing is guaranteed",
}
SECOND = {
    "record": "Opacus RDP",
    "client": "none: no second implementation of the Skellam mechanism's bound is installed",
    "none": "none: there is no ε",
}
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
    "Ledger, key and head were never all put back to an older copy together.",
    (
        "Noise is drawn in floating point or whole numbers as each run states; the guarantee is the"
        " mathematical mechanism's."
    ),
)
NOT_KEPT = "the ledger charged it; its manifest is not kept here"
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
    invitation = pinned_invitation(folder) if folder.federation.exists() else None
    last = entries[-1]
    refusals, not_kept = read_refusals(folder.refusals)
    strangers = [
        {name: value for name, value in line.items() if name in ("time", "reason")}
        for path in (folder.strangers.with_suffix(".1.jsonl"), folder.strangers)
        for line in read_lines(path, "time", "reason")
    ]
    return {
        "institution": policy.institution,
        "key": identity.public.text,
        "fingerprint": identity.public.fingerprint,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "federation": "" if invitation is None else invitation.federation,
        "coordinator": "" if invitation is None else invitation.coordinator.fingerprint,
        "peers": {name: peer.identity.fingerprint for name, peer in read_peers(folder).items()},
        "policy_digest": policy.digest,
        "budgets": [*_budgets(policy, ledger), *_former_budgets(policy, ledger, bodies)],
        "runs": [_run(folder, policy, bodies, digest) for digest in _runs(folder, bodies)],
        # as they were told, and what the policy said; details, which may quote a record, stay in
        # the node's own log
        "refusals": refusals,
        "refusals_not_kept": not_kept,
        "strangers": strangers,
        "ledger": {"id": entries[0].body["id"], "entries": last.number, "head": last.hash},
        "accountant": accountant_name(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "mechanisms": {mode: MECHANISMS[mode] for mode in _modes(policy)},
        "assumptions": list(ASSUMPTIONS),
        "noise_source": "the operating system's generator; no seed",
    }


def _modes(policy: Policy) -> list[str]:
    """The modes of privacy that the policy lets a run have."""
    allowed = {"client": policy.limits.client_level, "none": policy.limits.allow_unnoised}
    return ["record", *(mode for mode, each in allowed.items() if each)]


def _budgets(policy: Policy, ledger: Ledger) -> list[dict[str, Any]]:
    rows = []
    for name, budget in policy.budgets.items():
        spent = ledger.spent(name)
        rows.append(
            {
                "budget": name,
                "in_policy": True,
                "data": [key for key, data in policy.data.items() if data.budget == name],
                "epsilon": budget.epsilon,
                "epsilon_spent": spent.epsilon,
                "epsilon_left": max(budget.epsilon - spent.epsilon, 0.0),
                "delta": budget.delta,
                "delta_spent": spent.delta,
                "delta_left": max(budget.delta - spent.delta, 0.0),
            }
        )
    return rows


def _former_budgets(policy: Policy, ledger: Ledger, bodies: list[Body]) -> list[dict[str, Any]]:
    """What runs charged to budgets that the policy lacks now, with their last caps: still spent."""
    caps = {str(body["budget"]): body for body in bodies if body["kind"] == "consent"}
    rows = []
    for name, cap in caps.items():
        if name not in policy.budgets:
            spent = ledger.spent(name)
            rows.append(
                {
                    "budget": name,
                    "in_policy": False,
                    "data": [],
                    "epsilon": cap["cap_epsilon"],
                    "epsilon_spent": spent.epsilon,
                    "epsilon_left": 0.0,
                    "delta": cap["cap_delta"],
                    "delta_spent": spent.delta,
                    "delta_left": 0.0,
                }
            )
    return rows


def _run(folder: NodeFolder, policy: Policy, bodies: list[Body], digest: str) -> dict[str, Any]:
    mine = [body for body in bodies if body.get("manifest") == digest]
    sizes = list(Outbox(folder.under(policy.trainer.outbox)).sizes(digest))
    path = folder.run(digest) / "manifest.signed"
    if path.is_file():
        return _kept_run(folder, *kept_manifest(path), mine, sizes)
    return _lost_run(digest, mine, sizes)


def _lost_run(digest: str, mine: list[Body], sizes: list[Release]) -> dict[str, Any]:
    """A run that the ledger alone tells of: killed before its manifest was kept, or folder lost."""
    consents = [body for body in mine if body["kind"] == "consent"]
    return {
        "manifest": digest,
        "manifest_kept": False,
        "note": NOT_KEPT,
        "budget": [str(body["budget"]) for body in consents],
        "epsilon": max(float(body["epsilon"]) for body in consents),
        "delta": max(float(body["delta"]) for body in consents),
        "attempts_consented": max(sum(body["attempts"]) for body in consents),
        "attempts_reserved": sum(body["kind"] == "reserve" for body in mine),
        "updates_committed": sum(body["kind"] == "commit" for body in mine),
        "sent": _sent(sizes, "update, in clear or masked", ""),
    }


def _sent(sizes: list[Release], update: str, to: str) -> list[dict[str, Any]]:
    return [
        {
            "kind": update if attempt else "consent",
            "to": to,
            "round": number,
            "attempt": attempt,
            "bytes": size,
        }
        for number, attempt, size in sizes
    ]


def _kept_run(
    folder: NodeFolder,
    signed: Signed,
    manifest: RunManifest,
    mine: list[Body],
    sizes: list[Release],
) -> dict[str, Any]:
    digest = manifest.digest
    consents = [body for body in mine if body["kind"] == "consent"]
    epsilon = max((float(body["epsilon"]) for body in consents), default=None)
    update = "update" if manifest.secure is None else "masked update"
    left = sum(attempt > 0 for _, attempt, _ in sizes)
    return {
        "manifest": digest,
        "manifest_kept": True,
        "run": one_line(manifest.run),
        "federation": manifest.federation,
        "coordinator": signed.signer.text,
        "task": manifest.task,
        "unit": unit_of(manifest),
        "mode": manifest.mode,
        "mechanism": MECHANISMS[manifest.mode],
        "neighbours": NEIGHBOURS[manifest.mode],
        "noise": "none" if manifest.mode == "none" else noise_source(manifest),
        "budget": [str(body["budget"]) for body in consents],
        "epsilon": epsilon,
        "delta": manifest.delta,
        "accountant": _accountant(manifest),
        "epsilon_second_accountant": _second(manifest),
        "second_accountant": SECOND[manifest.mode],
        "phases": [
            {
                "name": phase.name,
                "sampling_rate": phase.sampling_rate,
                "noise_multiplier": phase.noise_multiplier,
                "clip": phase.clip,
                "head_clip": phase.head_clip,
                "rounds": phase.rounds,
                "attempts": phase.attempts,
                "steps": phase.steps,
            }
            for phase in manifest.phases
        ],
        "attempts_reserved": sum(body["kind"] == "reserve" for body in mine),
        # the ledger has no entry of a run without ε
        "updates_committed": (
            left if manifest.mode == "none" else sum(body["kind"] == "commit" for body in mine)
        ),
        "sent": _sent(sizes, update, signed.signer.fingerprint),
        "data": _versions(folder.run(digest) / "data.jsonl"),
        "base_digest": manifest.base_digest,
        "spec_digest": manifest.spec_digest,
        "aggregation": (
            "updates left in clear" if manifest.secure is None else "updates left under masks"
        ),
        "sums": _sums(folder.run(digest) / "secure.jsonl"),
        "statement": (
            [*privacy_statement(manifest, epsilon), *secure_statement(manifest)]
            if epsilon is not None or manifest.mode == "none"
            else []
        ),
    }


def _versions(path: Path) -> list[dict[str, Any]]:
    """When data were used, and whether they had changed; a digest would let guesses be tried."""
    lines = list(read_lines(path, "time", "data"))
    known = list(dict.fromkeys(line["data"] for line in lines))
    return [{"time": line["time"], "version": 1 + known.index(line["data"])} for line in lines]


def _accountant(manifest: RunManifest) -> str:
    if manifest.mode == "client":
        return "Rényi bound of the Skellam mechanism (Agarwal, Kairouz and Liu 2021)"
    return accountant_name() if manifest.mode == "record" else "none: there is no ε"


def _sums(path: Path) -> list[dict[str, Any]]:
    """Each sum that may hold an input of this node, by its last line.

    Also where it was not asked to confirm it.
    """
    lines = enumerate(read_lines(path))
    return list({str(line.get("attempt", f"line {place}")): line for place, line in lines}.values())


def _second(manifest: RunManifest) -> float | None:
    """ε of the whole schedule by Rényi: looser, by other arithmetic; None where it has no bound."""
    if manifest.mode != "record":
        return None
    epsilon = renyi_epsilon(history_of(manifest), manifest.delta)
    return epsilon if math.isfinite(epsilon) else None


def _runs(folder: NodeFolder, bodies: list[Body]) -> list[str]:
    """The runs that were consented to: whose manifest is kept, or which the ledger charged."""
    kept = {f"sha256:{path.parent.name}" for path in folder.runs.glob("*/manifest.signed")}
    return sorted(kept | {str(body["manifest"]) for body in bodies if body["kind"] == "consent"})


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
