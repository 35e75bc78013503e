"""The released adapter: what a receiver needs to use it, and, alone, to check its origin.

    adapter/            PEFT's files, the head where it is ours, and what they are
                        (common.adapter.released)
    README.md           the model card, with the privacy statement: it follows from the other files,
                        word for word
    figures.json        what the coordinator measured on public data, as the card shows it
    manifest.json       everything public about the run, signed by the coordinator
    members.json        the institutions' keys as they were enrolled, signed by the coordinator
    statements/         what each institution signed for itself: what it reserved, under which
                        policy
    reports/            an institution's own report, where it gave one
    release.json        the SHA-256 of every file above, signed by the coordinator

Every byte is covered: a file that was changed, added or removed is named. Without the coordinator's
key from elsewhere that shows integrity only: that the folder is as whoever made it left it.

The adapter is of the network, the labels and the base that the manifest names, and its tensors are
the ones that its own description counts. That these values came from this run's updates nobody can
compute who has not seen them: it rests on the coordinator's signature.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from fedlora.common.adapter.released import DESCRIPTION, description_text, published
from fedlora.common.disk.files import sync_folder, write_atomically
from fedlora.common.errors import BadInput, Refused
from fedlora.common.protocol.messages import Consent
from fedlora.common.trust.identity import Identity, Signed, seal
from fedlora.server.release.card import shown_figures
from fedlora.server.release.layout import (
    ADAPTER,
    CARD,
    EXPORT_MEMBERS_TAG,
    FIGURES,
    INDEX,
    MANIFEST,
    MEMBERS,
    MEMBERS_VERSION,
    RELEASE_MANIFEST_TAG,
    RELEASE_TAG,
    REPORTS,
    STATEMENTS,
    VERSION,
    Release,
)
from fedlora.server.release.signed_consents import statement_text
from fedlora.server.release.verify import (
    digest_of,
    files_of,
    opened_consent,
    read_adapter,
    rebuilt_card,
    verify,
)


def export(folder: Path, coordinator: Identity, release: Release, adapter: Path) -> list[str]:
    """Write `folder` and verify it; BadInput where it exists, or a statement is none.

    `adapter` is a PEFT folder.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: found something there, expected no folder or an empty one")
    if not (adapter / "adapter_config.json").is_file():
        raise BadInput(f"{adapter}: found no adapter_config.json, expected an exported adapter")
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        _fill(scratch, coordinator, release, adapter)
        # nothing is handed out that nobody could verify
        checked = verify(scratch, coordinator.public)
        found = read_adapter(scratch)[1].digest
        if found != release.adapter:
            raise Refused(
                f"{adapter}: found adapter {found}, expected {release.adapter}, which the run"
                " committed"
            )
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync_folder(folder.parent)
    return checked


def _fill(folder: Path, coordinator: Identity, release: Release, adapter: Path) -> None:
    shutil.copytree(adapter, folder / ADAPTER, symlinks=True)
    files_of(folder)  # a link is refused, not followed
    told = published(folder / ADAPTER, read_adapter(folder)[0])
    _write(folder / ADAPTER / DESCRIPTION, description_text(told))
    for name in (STATEMENTS, *([REPORTS] if release.reports else [])):
        (folder / name).mkdir()
    if unknown := sorted({*release.statements, *release.reports} - set(release.institutions)):
        raise BadInput(f"{STATEMENTS}: found {unknown[0]!r}, expected members only")
    manifest, keys = (
        release.manifest,
        {n: each.identity for n, each in release.institutions.items()},
    )
    statements: dict[str, Consent] = {}
    for name, data in release.statements.items():
        statements[name] = opened_consent(data, name, manifest, keys)
        _write(folder / STATEMENTS / f"{name}.json", statement_text(statements[name], data))
    for name, text in release.reports.items():
        _write(folder / REPORTS / f"{name}.json", text)
    members = {
        name: {
            "organisation": each.organisation,
            "identity": each.identity.text,
            "others": [key.text for key in each.others],
        }
        for name, each in release.institutions.items()
    }
    body = {"version": MEMBERS_VERSION, "institutions": members}
    signed = Signed.by(coordinator, RELEASE_MANIFEST_TAG, manifest.to_bytes())
    _write(folder / MANIFEST, signed.text)
    _write(folder / MEMBERS, seal(coordinator, EXPORT_MEMBERS_TAG, body))
    figures = shown_figures(release.figures)
    _write(folder / FIGURES, json.dumps(figures, indent=1, sort_keys=True) + "\n")
    _write(folder / CARD, rebuilt_card(manifest, release.institutions, statements, figures))
    files = {name: digest_of(folder, name) for name in files_of(folder)}
    _write(folder / INDEX, seal(coordinator, RELEASE_TAG, {"version": VERSION, "files": files}))


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())
