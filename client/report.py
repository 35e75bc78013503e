"""`fedlora-node report`: what a data protection officer asks for, signed by the node, and as a page.

Everything comes from the ledger, the outbox, the refusal log and the manifests that the node itself kept. The
figures are recomputed here; a second accountant (Rényi) states its own, larger, bound beside the first.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedlora.client.node import NodeFolder, pinned_invitation, read_peers
from fedlora.client.outbox import Outbox
from fedlora.client.policy import Policy
from fedlora.common.errors import BadInput
from fedlora.common.identity import Identity, PublicIdentity, Signed
from fedlora.common.ledger import Entry, Ledger
from fedlora.common.messages import RunManifest
from fedlora.common.privacy import accountant_name, history_of
from fedlora.common.protocol import MANIFEST_TAG
from fedlora.common.sealed import Sealed, seal, unseal
from fedlora.common.statement import NOISE_SOURCE, privacy_statement, secure_statement, unit_of

REPORT_TAG = "fedlora-node-report-1"
MECHANISMS = {
    "record": "Poisson-subsampled Gaussian, per-unit clip",
    "client": "clip of the whole update, Skellam noise shared under secure aggregation",
}
PACKAGES = ("fedlora", "flwr", "grpcio", "opacus", "torch", "transformers", "peft", "cryptography")


def write_report(
    folder: NodeFolder, policy: Policy, identity: Identity, ledger: Ledger, out: Path
) -> Mapping[str, Any]:
    """`report.json`, signed, and `report.html` in `out`; the report's body."""
    body = report_body(folder, policy, identity, ledger)
    out.mkdir(parents=True, exist_ok=True)
    text = seal(identity, REPORT_TAG, body)
    (out / "report.json").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(page(body), encoding="utf-8")
    return body


def read_report(path: Path, expected: PublicIdentity | None = None) -> Sealed:
    """A report; Refused where one byte is not as it was signed."""
    try:
        return unseal(path.read_bytes().decode(), REPORT_TAG, path.name, expected)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: can't be read as a report ({error})") from error


def report_body(folder: NodeFolder, policy: Policy, identity: Identity, ledger: Ledger) -> dict[str, Any]:
    """The report as a table."""
    entries = ledger.entries()
    invitation = pinned_invitation(folder) if folder.federation.exists() else None
    last = entries[-1]
    return {
        "institution": policy.institution,
        "key": identity.public.text,
        "fingerprint": identity.public.fingerprint,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "federation": "" if invitation is None else invitation.federation,
        "coordinator": "" if invitation is None else invitation.coordinator.fingerprint,
        "peers": {name: peer.identity.fingerprint for name, peer in read_peers(folder).items()},
        "policy_digest": policy.digest,
        "budgets": _budgets(policy, ledger),
        "runs": [_run(folder, policy, entries, digest) for digest in _runs(folder)],
        # as they were told; the details, which may quote a record, stay in the node's own log
        "refusals": _refusals(folder),
        "ledger": {"id": entries[0].body["id"], "entries": last.number, "head": last.hash},
        "accountant": accountant_name(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "neighbours": "data sets that differ by adding or removing one unit",
        "noise": NOISE_SOURCE,
        "noise_source": "the operating system's generator; no seed",
    }


def _budgets(policy: Policy, ledger: Ledger) -> list[dict[str, Any]]:
    rows = []
    for name, budget in policy.budgets.items():
        spent = ledger.spent(name)
        rows.append(
            {
                "budget": name,
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


def _run(folder: NodeFolder, policy: Policy, entries: list[Entry], digest: str) -> dict[str, Any]:
    signed = Signed.from_bytes((folder.run(digest) / "manifest.signed").read_bytes(), "kept manifest")
    manifest = RunManifest.from_bytes(signed.opened(MANIFEST_TAG, signed.signer))
    mine = [entry.body for entry in entries if entry.body.get("manifest") == digest]
    consents = [body for body in mine if body["kind"] == "consent"]
    epsilon = max((float(body["epsilon"]) for body in consents), default=None)
    sent = [
        {"to": signed.signer.fingerprint, "round": number, "attempt": attempt, "bytes": size}
        for number, attempt, size in Outbox(folder.under(policy.trainer.outbox)).sizes(digest)
    ]
    return {
        "manifest": digest,
        "federation": manifest.federation,
        "coordinator": signed.signer.text,
        "task": manifest.task,
        "unit": unit_of(manifest),
        "mode": manifest.mode,
        "mechanism": MECHANISMS.get(manifest.mode, "none"),
        "budget": [str(body["budget"]) for body in consents],
        "epsilon": epsilon,
        "delta": manifest.delta,
        "epsilon_second_accountant": _second(manifest),
        "second_accountant": f"Opacus {_version('opacus')} RDP",
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
        "updates_committed": sum(body["kind"] == "commit" for body in mine),
        "sent": sent,
        "data": _versions(folder.run(digest) / "data.jsonl"),
        "base_digest": manifest.base_digest,
        "spec_digest": manifest.spec_digest,
        "aggregation": "updates left in clear" if manifest.secure is None else "updates left under masks",
        "sums": _sums(folder.run(digest) / "secure.jsonl"),
        "statement": [*privacy_statement(manifest, epsilon), *secure_statement(manifest)]
        if epsilon is not None or manifest.mode == "none"
        else [],
    }


def _refusals(folder: NodeFolder) -> list[dict[str, Any]]:
    lines = [line for path in (folder.strangers, folder.refusals) for line in _lines(path, "time", "reason")]
    return [
        {k: v for k, v in line.items() if k != "detail"}
        for line in sorted(lines, key=lambda line: line["time"])
    ]


def _versions(path: Path) -> list[dict[str, Any]]:
    """When data were used, and whether they had changed; a digest would tell two guesses at them apart."""
    lines = list(_lines(path, "time", "data"))
    known = list(dict.fromkeys(line["data"] for line in lines))
    return [{"time": line["time"], "version": 1 + known.index(line["data"])} for line in lines]


def _sums(path: Path) -> list[dict[str, Any]]:
    """Each sum that may hold an input of this node, by its last line: also where it was not asked to confirm it."""
    lines = enumerate(_lines(path))
    return list({line.get("attempt", f"line {place}"): line for place, line in lines}.values())


def _second(manifest: RunManifest) -> float | None:
    """ε of the whole schedule by Rényi accounting: looser, and by other arithmetic."""
    if manifest.mode != "record":
        return None
    import warnings

    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(m.noise_multiplier, m.sampling_rate, m.steps) for m in history_of(manifest)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(manifest.delta))


def _runs(folder: NodeFolder) -> Iterator[str]:
    for path in sorted(folder.runs.glob("*/manifest.signed")):
        yield f"sha256:{path.parent.name}"


def _lines(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """A log's lines, its older generation first; one that a kill or a fault spoilt says so, where `keys` should be."""
    for each in (path.with_suffix(".1.jsonl"), path):
        for line in each.read_bytes().splitlines() if each.is_file() else ():
            try:
                table = json.loads(line)
            except ValueError:
                table = None
            if isinstance(table, dict) and all(isinstance(table.get(key), str) for key in keys):
                yield table
            else:
                yield dict.fromkeys(keys or ("line",), "unreadable")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def page(body: Mapping[str, Any]) -> str:
    """The report as a page by itself: no script, nothing fetched."""
    parts = [f"<h1>Privacy report of {html.escape(str(body['institution']))}</h1>"]
    parts.extend(_section(str(name), value) for name, value in body.items() if name != "institution")
    style = "body{font:15px sans-serif;max-width:70em;margin:2em auto}td,th{border:1px solid #bbb;padding:.3em;text-align:left;vertical-align:top}table{border-collapse:collapse}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>fedlora node report</title>'
        f"<style>{style}</style>{''.join(parts)}</html>\n"
    )


def _section(name: str, value: Any) -> str:
    return f"<h2>{html.escape(name.replace('_', ' '))}</h2>{_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = "".join(
            f"<tr><th>{html.escape(str(k))}</th><td>{_shown(v)}</td></tr>" for k, v in value.items()
        )
        return f"<table>{rows}</table>" if rows else "none"
    if isinstance(value, list):
        return "".join(f"<div>{_shown(each)}</div>" for each in value) or "none"
    return html.escape("" if value is None else str(value))
