"""The released adapter: what a receiver needs to use it, and to check where it came from without asking anybody.

    adapter/            PEFT's files, and the head where it is ours
    README.md           the model card
    summary.json        the run's figures
    manifest.signed     everything public about the run, signed by the coordinator
    statements/         what each institution signed for itself: what it reserved, under which policy
    release.json        the digest of every file above, the institutions' keys; signed by the coordinator

Every byte is covered: a file that was changed, added or removed is named. Without the coordinator's key from
elsewhere, that shows integrity only: that the folder is as whoever made it left it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.common.errors import BadInput, Refused
from fedlora.common.files import write_atomically
from fedlora.common.identity import PublicIdentity, Signed
from fedlora.common.messages import RunManifest
from fedlora.common.protocol import MANIFEST_TAG, Consent, reply_from_bytes
from fedlora.common.sealed import seal, unseal
from fedlora.common.statement import shown_epsilon
from fedlora.server.directory import Directory

TAG = "fedlora-release-1"
INDEX = "release.json"
MAX_FILE_BYTES = 4 << 30


def write_release(directory: Directory, run: Path | None, target: Path) -> None:
    """The finished run in the folder `run` as a release; BadInput where it is not finished or `target` is not empty."""
    if run is None or not (run / "summary.json").is_file():
        raise BadInput(f"{run or directory.root}: found no finished run to export")
    if target.exists() and any(target.iterdir()):
        raise BadInput(f"{target}: found files, expected an empty folder")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run / "adapter", target / "adapter", dirs_exist_ok=True)
    shutil.copy(run / "summary.json", target / "summary.json")
    shutil.copy(run / "manifest.signed", target / "manifest.signed")
    statements = target / "statements"
    statements.mkdir()
    for path in sorted((run / "consents").glob("*.reply")):
        shutil.copy(path, statements / path.name)
    summary = json.loads((run / "summary.json").read_text())
    members = {each.name: each for each in directory.registry.members()}
    consented = [path.stem for path in sorted(statements.glob("*.reply"))]
    keys = {name: members[name].identity for name in consented}
    card = _card(summary, directory, {name: members[name].organisation for name in consented})
    write_atomically(target / "README.md", card.encode())
    body = {
        "federation": directory.settings.federation,
        "adapter_digest": summary["adapter_digest"],
        "institutions": keys,
        "files": {name: _digest(target / name) for name in _files(target)},
    }
    write_atomically(target / INDEX, seal(directory.identity, TAG, body).encode())


def check_release(folder: Path, key: PublicIdentity | None) -> list[str]:
    """What was checked, a line each; Refused or BadInput names the first thing that is not as it was signed."""
    index = folder / INDEX
    try:
        text = index.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{index}: found no release, expected what fedlora-server export writes") from error
    sealed = unseal(text, TAG, INDEX, key)
    body = sealed.body
    try:
        expected = {str(name): str(value) for name, value in body["files"].items()}
        members = {
            str(name): PublicIdentity.from_text(str(text), f"{INDEX} institutions")
            for name, text in body["institutions"].items()
        }
        federation, adapter = str(body["federation"]), str(body["adapter_digest"])
    except (KeyError, AttributeError) as error:
        raise BadInput(f"{INDEX}: found another table than an export writes") from error
    _check_files(folder, expected)
    manifest = _manifest(folder, sealed.signer)
    summary = json.loads((folder / "summary.json").read_text())
    if summary.get("adapter_digest") != adapter:
        raise Refused("summary.json adapter_digest: found another than the release names")
    largest = _check_statements(folder, federation, members, manifest)
    if summary.get("epsilon") is not None and summary["epsilon"] < largest:
        raise Refused("summary.json epsilon: found less than an institution's own statement")
    signer = f"signed by {sealed.signer.fingerprint}"
    checked = f"{len(expected)} files, {len(members)} statements; ε at most {shown_epsilon(largest)}"
    if key is None:
        return [checked, signer, "integrity only: compare this fingerprint with the coordinator's own"]
    return [checked, signer, "verified"]


def _check_files(folder: Path, expected: Mapping[str, str]) -> None:
    found = _files(folder)
    for name in sorted(set(found) - set(expected)):
        raise Refused(f"{name}: found a file that was not released")
    for name, digest in sorted(expected.items()):
        if name not in found:
            raise Refused(f"{name}: missing")
        if _digest(folder / name) != digest:
            raise Refused(f"{name}: found other bytes than were released")


def _check_statements(
    folder: Path, federation: str, members: Mapping[str, PublicIdentity], manifest: RunManifest
) -> float:
    """The largest ε that an institution states for this run."""
    stated = [0.0]
    for name, identity in members.items():
        path = folder / "statements" / f"{name}.reply"
        reply = reply_from_bytes(path.read_bytes(), federation, {name: identity})
        if not isinstance(reply, Consent) or reply.manifest != manifest.digest:
            raise Refused(f"statements/{path.name}: found a statement about another run")
        stated.append(reply.epsilon)
    return max(stated)


def _manifest(folder: Path, signer: PublicIdentity) -> RunManifest:
    signed = Signed.from_bytes((folder / "manifest.signed").read_bytes(), "manifest.signed")
    return RunManifest.from_bytes(signed.opened(MANIFEST_TAG, signer))


def _files(folder: Path) -> list[str]:
    """Every file but the index; Refused where something is neither a file nor a folder of them."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise Refused(f"{name}: found a link or a device, expected plain files")
        if path.is_dir() and not any(path.iterdir()):
            raise Refused(f"{name}: found an empty folder, expected files")
        if path.is_file() and name != INDEX:
            found.append(name)
    return found


def _digest(path: Path) -> str:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise Refused(f"{path.name}: found more than {MAX_FILE_BYTES} bytes")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _card(summary: Mapping[str, Any], directory: Directory, organisations: Mapping[str, str]) -> str:
    """The model card, with the privacy statement in plain words."""
    metrics = [
        f"| {name} | {summary[name]:.4g} |"
        for name in ("accuracy", "macro_f1", "perplexity", "loss")
        if isinstance(summary.get(name), float)
    ]
    stated = summary.get("epsilon_by_client", {})
    rows = [
        f"| {name} | {_cell(organisations[name])} | {shown_epsilon(stated.get(name, 0.0))} |"
        for name in organisations
    ]
    return "\n".join(
        [
            "---",
            "library_name: peft",
            "tags: [lora, federated-learning, differential-privacy]",
            "---",
            f"# An adapter of the federation {directory.settings.federation}",
            "",
            f"A LoRA adapter for {summary['task']}, trained over {summary['rounds']} rounds by "
            f"{len(organisations)} institutions that shared no text. Base model: `{summary['base_digest']}`.",
            "",
            "## Privacy",
            "",
            *[f"* {sentence}" for sentence in summary["privacy_statement"]],
            "",
            "| institution | organisation | ε it reserved |",
            "|---|---|---|",
            *rows,
            "",
            "Each figure is what the institution signed for itself; `statements/` holds the signed bytes.",
            "",
            "## Figures, on the coordinator's public test file",
            "",
            "| metric | value |",
            "|---|---|",
            *metrics,
            "",
            "## Use",
            "",
            "```python",
            "from fedlora.common.export import load_adapter",
            "",
            'model = load_adapter("adapter")',
            "```",
            "",
            "Check it first: `fedlora-server verify . --key coordinator.pub`.",
            "",
        ]
    )


def _cell(text: str) -> str:
    return "".join(letter if letter.isprintable() and letter not in "|<>[]`" else " " for letter in text)
