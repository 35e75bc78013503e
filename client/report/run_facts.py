"""What a report tells of each run that was consented to.

From its manifest, and from what the ledger and the outbox hold of it.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from fedlora.client.consent.offer import kept_manifest
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.outbox import START, Outbox, Release
from fedlora.client.node.roster import read_peers
from fedlora.client.node.waiting_runs import CONSENTED, STARTED, noted
from fedlora.client.service.refusal_log import read_lines
from fedlora.common.privacy.figures import exact
from fedlora.common.privacy.guarantee import Guarantee
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.terminal import one_line

Body = dict[str, Any]  # of an entry of the ledger
NOT_KEPT = "the ledger charged it; its manifest is not kept here"
_NOTHING = {"epsilon": Fraction(0), "delta": Fraction(0)}
PHASE_FACTS = (
    *("name", "sampling_rate", "noise_multiplier", "clip", "head_clip"),
    *("rounds", "attempts", "steps"),
)


def consented_runs(folder: NodeFolder, bodies: list[Body]) -> list[str]:
    """The digests of the runs whose manifest is kept, or which the ledger charged."""
    kept = {f"sha256:{path.parent.name}" for path in folder.manifests()}
    return sorted(kept | {str(body["manifest"]) for body in bodies if body["kind"] == "consent"})


def federations(folder: NodeFolder, bodies: list[Body]) -> list[Body]:
    """Each federation that charged this ledger, through whichever node folder, and what."""
    found: dict[tuple[str, str], Body] = {}
    for body in _of_kind(bodies, "consent"):
        name = str(body.get("federation", "")) or _kept_federation(folder, str(body["manifest"]))
        budget = str(body["budget"])
        line = found.setdefault(
            (name, budget), {"federation": name, "budget": budget, "runs": 0, **_NOTHING}
        )
        line["runs"] += 1
        for each in _NOTHING:
            line[each] += exact(float(body[each]))
    return [
        line | {each: float(line[each]) for each in _NOTHING} for _, line in sorted(found.items())
    ]


def _kept_federation(folder: NodeFolder, digest: str) -> str:
    """Of a consent by an earlier version, which did not say; "" where it is not known."""
    path = folder.manifest(digest)
    return kept_manifest(path)[1].federation if path.is_file() else ""


def run_facts(folder: NodeFolder, outbox: Outbox, bodies: list[Body], digest: str) -> Body:
    """All that is known of the run; `bodies` are those of the whole ledger's entries."""
    mine = [body for body in bodies if body.get("manifest") == digest]
    sizes = list(outbox.sizes(digest))
    if folder.manifest(digest).is_file():
        return _kept_run(folder, digest, mine, sizes)
    return _lost_run(digest, mine, sizes)


def _lost_run(digest: str, mine: list[Body], sizes: list[Release]) -> Body:
    """A run that the ledger alone tells of: killed before its manifest was kept, or folder lost."""
    consents = _of_kind(mine, "consent")
    return {
        "manifest": digest,
        "manifest_kept": False,
        "note": NOT_KEPT,
        "federation": next((name for body in consents if (name := body.get("federation"))), ""),
        "budget": [str(body["budget"]) for body in consents],
        "epsilon": max(float(body["epsilon"]) for body in consents),
        "delta": max(float(body["delta"]) for body in consents),
        "attempts_consented": max(sum(body["attempts"]) for body in consents),
        "attempts_reserved": len(_of_kind(mine, "reserve")),
        "updates_committed": len(_of_kind(mine, "commit")),
        "sent": _sent(sizes, "update, in clear or masked", ""),
    }


def _kept_run(folder: NodeFolder, digest: str, mine: list[Body], sizes: list[Release]) -> Body:
    signed, manifest = kept_manifest(folder.manifest(digest))
    guarantee = guarantee_of(manifest)
    consents, masked = _of_kind(mine, "consent"), manifest.secure is not None
    epsilon = max((float(body["epsilon"]) for body in consents), default=None)
    left = sum(each.attempt > 0 for each in sizes)
    return {
        "manifest": manifest.digest,
        "manifest_kept": True,
        "run": one_line(manifest.run),
        "federation": manifest.federation,
        "coordinator": signed.signer.text,
        "task": manifest.task,
        "budget": [str(body["budget"]) for body in consents],
        "epsilon": epsilon,
        **_promised(guarantee, epsilon),
        "phases": [{key: getattr(each, key) for key in PHASE_FACTS} for each in manifest.accounted],
        **_agreed(folder, digest),
        "attempts_reserved": len(_of_kind(mine, "reserve")),
        # the ledger has no entry of a run without ε
        "updates_committed": len(_of_kind(mine, "commit")) if guarantee.private else left,
        "sent": _sent(sizes, "masked update" if masked else "update", signed.signer.fingerprint),
        "data": _versions(folder.data_log(digest)),
        "base_digest": manifest.base_digest,
        "spec_digest": manifest.spec_digest,
        "aggregation": "updates left under masks" if masked else "updates left in clear",
        "wire": manifest.wire,
        "batches": manifest.batches,
        "sums": _sums(folder.sums_log(digest)),
    }


def _agreed(folder: NodeFolder, digest: str) -> Body:
    """When, with whom, and what the policy's limits were; "" and nothing where none was kept."""
    begun = [noted(folder.run(digest) / name) for name in (CONSENTED, STARTED)]
    consented, started = ({"time": each.get("time", "")} for each in begun)
    limits = {"policy": begun[0].get("policy", ""), "limits": begun[0].get("limits", {})}
    peers = {name: peer.organisation for name, peer in read_peers(folder).items()}
    cohort = {str(name): peers.get(str(name), "") for name in begun[1].get("cohort", ())}
    return {"consented": consented | limits, "started": started, "cohort": cohort}


def _promised(guarantee: Guarantee, epsilon: float | None) -> Body:
    """What its schedule guarantees, to whom, and by which arithmetic."""
    charged = epsilon is not None or not guarantee.private
    return {
        "unit": guarantee.unit,
        "mode": guarantee.name,
        "mechanism": guarantee.mechanism,
        "neighbours": guarantee.neighbours,
        "noise": guarantee.noise,
        "delta": guarantee.manifest.delta,
        "accountant": guarantee.accountant,
        "epsilon_second_accountant": guarantee.second_epsilon(),
        "epsilon_alone": guarantee.epsilon_alone(),
        "second_accountant": guarantee.second_accountant,
        "statement": guarantee.statement(epsilon) if charged else [],
    }


def _of_kind(mine: list[Body], kind: str) -> list[Body]:
    return [body for body in mine if body["kind"] == kind]


def _sent(sizes: list[Release], update: str, to: str) -> list[Body]:
    return [
        {
            "kind": update if each.attempt else "start" if each.kind == START else "consent",
            "to": to,
            "round": each.round,
            "attempt": each.attempt,
            "bytes": each.size,
        }
        for each in sizes
    ]


def _versions(path: Path) -> list[Body]:
    """When data were used, and whether they had changed; a digest would let guesses be tried."""
    lines = list(read_lines(path, "time", "data"))
    known = list(dict.fromkeys(line["data"] for line in lines))
    return [{"time": line["time"], "version": 1 + known.index(line["data"])} for line in lines]


def _sums(path: Path) -> list[Body]:
    """Each sum that may hold an input of this node, by its last line.

    Also where it was not asked to confirm it.
    """
    lines = enumerate(read_lines(path))
    return list({str(line.get("attempt", f"line {place}")): line for place, line in lines}.values())
