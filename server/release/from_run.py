"""A finished run's folder as a release.

What the round loop left there, and the members as they were enrolled.

checkpoint/                the run's manifest, and the state that it committed last
consents/NAME.started      the exact bytes that NAME signed: what it reserved; NAME.reply of a run
                           from before there were starts
summary.json, adapter/     figures and the adapter, written when the run ended
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.common.adapter.released import read_spec
from fedlora.common.codec.strict import json_table
from fedlora.common.disk.files import read_bytes, read_text
from fedlora.common.errors import BadInput, Refused
from fedlora.common.protocol.messages import Consent, reply_from_bytes
from fedlora.common.trust.identity import MAX_TEXT_BYTES, PublicIdentity
from fedlora.server.coordinator.folder import Directory
from fedlora.server.coordinator.members import REVOKED
from fedlora.server.release.export import export
from fedlora.server.release.layout import Institution, Release
from fedlora.server.rounds.checkpoint import Checkpoint


def export_run(
    directory: Directory, run: Path, target: Path, reports: Path | None = None
) -> list[str]:
    """Release the finished run in `run`; `reports`: NAME.json of `fedlora-node report`, if any."""
    summary = read_summary(run)
    checkpoint = Checkpoint.open(run / "checkpoint", read_spec(run / "adapter"))
    manifest = checkpoint.manifest
    paths = sorted((run / "consents").glob("*.started"))
    paths = paths or sorted((run / "consents").glob("*.reply"))
    statements = {path.stem: path.read_bytes() for path in paths}
    release = Release(
        manifest=manifest,
        institutions={
            name: _institution(directory, name, data, manifest.federation)
            for name, data in statements.items()
        },
        statements=statements,
        adapter=checkpoint.load().release.digest,
        figures=summary,
        reports=_reports(reports),
    )
    return export(target, directory.identity, release, run / "adapter")


def find_run(directory: Directory, number: int | None) -> Path:
    """The folder of run `number`, or of the last one."""
    runs = directory.runs()
    if not runs:
        raise BadInput(f"{directory.root / 'runs'}: found no run")
    if number is None:
        return runs[-1]
    for path in runs:
        if int(path.name) == number:
            return path
    raise BadInput(
        f"run: found {number}, expected one of {', '.join(path.name for path in runs)}"[:400]
    )


def _institution(directory: Directory, name: str, signed: bytes, federation: str) -> Institution:
    """The member as it was when it signed: keys rotate, members leave, statements stay."""
    known = [member for member in directory.registry.members() if member.name == name]
    for member in reversed(known):
        if _signed_by(signed, federation, name, member.identity):
            others = [
                each.identity for each in known if each is not member and each.reason != REVOKED
            ]
            return Institution(member.organisation, member.identity, tuple(others))
    raise BadInput(f"consents/{name}: found a signature of no key that {name} was enrolled with")


def _signed_by(data: bytes, federation: str, name: str, identity: PublicIdentity) -> bool:
    try:
        return isinstance(reply_from_bytes(data, federation, {name: identity}), Consent)
    except Refused:
        return False


def read_summary(run: Path) -> dict[str, Any]:
    """What a run that ended left; BadInput where there is none."""
    path = run / "summary.json"
    if not path.is_file():
        raise BadInput(f"{path}: missing, expected a run that ended; see fedlora-server status")
    return json_table(read_bytes(path, MAX_TEXT_BYTES), str(path), MAX_TEXT_BYTES)


def _reports(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    found = {path.stem: read_text(path, MAX_TEXT_BYTES) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise BadInput(f"{folder}: found no reports, expected NAME.json of each institution")
    return found
