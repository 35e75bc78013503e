"""Is a release what its coordinator and its institutions signed? Every byte is checked, offline."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fedlora.common.adapter.released import FILES as ADAPTER_FILES
from fedlora.common.adapter.released import Description, read_released
from fedlora.common.codec.strict import MAX_MESSAGE_BYTES, build, json_table
from fedlora.common.disk.files import read_text
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import AdapterLayout, RunManifest
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import Consent, reply_from_bytes
from fedlora.common.terminal import fault_lines
from fedlora.common.trust.enrolment import FEDERATION, NAME
from fedlora.common.trust.identity import MAX_TEXT_BYTES, PublicIdentity, Signed, unseal
from fedlora.server.release.card import LOADERS, as_earlier, model_card, shown_figures
from fedlora.server.release.layout import (
    ADAPTER,
    CARD,
    EXPORT_MEMBERS_TAG,
    FIGURES,
    INDEX,
    MANIFEST,
    MAX_FILES,
    MEMBERS,
    MEMBERS_VERSION,
    RELEASE_MANIFEST_TAG,
    RELEASE_TAG,
    REPORT_TAG,
    REPORTS,
    STATEMENTS,
    VERSION,
    Institution,
)
from fedlora.server.release.signed_consents import (
    Statement,
    consent_faults,
    read_statement,
    statement_text,
)


def verify_export(folder: Path | str, key: Path | str | None = None) -> list[str]:
    """`verify` with the coordinator's public key in a file, `key`, from a trusted source."""
    if key is None:
        return verify(Path(folder))
    text = read_text(Path(key), 1 << 12)
    return verify(Path(folder), PublicIdentity.from_text(text.strip(), Path(key).name))


def verify(folder: Path, key: PublicIdentity | None = None) -> list[str]:
    """What was checked, a line each, offline.

    Refused or BadInput names the first file that is not as it was signed. Neither these lines nor a
    fault's can hold more than they seem to: whoever made the folder wrote what they name.
    """
    try:
        return _verified(folder, key)
    except BadInput as error:
        raise BadInput(fault_lines(error)) from error
    except Refused as error:
        raise Refused("; ".join(fault_lines(error))) from error


def _verified(folder: Path, key: PublicIdentity | None) -> list[str]:
    index = _sealed(folder, INDEX, RELEASE_TAG, key)
    expected = _index(index.table)
    _check_files(folder, expected)
    signer = index.signer
    body = _sealed(folder, MANIFEST, RELEASE_MANIFEST_TAG, signer).body
    manifest = RunManifest.from_bytes(body)
    if not FEDERATION.fullmatch(manifest.federation):
        raise BadInput(
            f"{MANIFEST} federation: found {manifest.federation[:80]!r}, expected a short name"
        )
    institutions = _institutions(_sealed(folder, MEMBERS, EXPORT_MEMBERS_TAG, signer).table)
    statements = _statements(folder, manifest, institutions, expected)
    reports = _reports(folder, institutions, expected)
    _check_card(folder, index.table["version"], manifest, institutions, statements)
    adapter = _check_adapter(folder, manifest)
    largest = max((statement.epsilon for statement in statements.values()), default=0.0)
    checked = [
        f"files        {len(expected)} as they were signed, none added, none missing",
        f"manifest     {manifest.digest} of {manifest.federation}, {manifest.rounds} rounds",
        f"adapter      {adapter}, of the network in the manifest",
        (
            f"statements   {len(statements)}, each signed by its institution; ε at most"
            f" {shown_epsilon(largest)}"
        ),
        *_evaluated(manifest),
        *([f"reports      {len(reports)}, each signed by its institution"] if reports else []),
        f"signed by    {signer.fingerprint}",
    ]
    if key is None:
        return [*checked, "integrity only: compare this fingerprint with the coordinator's own"]
    return [*checked, "verified with the coordinator's key"]


def _evaluated(manifest: RunManifest) -> list[str]:
    """That hold-outs were counted too, within what was stated; nothing where none were."""
    terms, cost = manifest.evaluation, guarantee_of(manifest).evaluation_epsilon()
    if terms is None:
        return []
    price = "without noise" if cost is None else f"within that ε: {shown_epsilon(cost)} by itself"
    return [f"evaluation   counts ({', '.join(terms.counts)}) of {terms.hold_out:.0%}, {price}"]


def _index(body: Mapping[str, Any]) -> dict[str, str]:
    """Digests by path; BadInput where it is another table than `export` writes."""
    files = body.get("files")
    if (
        set(body) != {"version", "files"}
        or type(body["version"]) is not int
        or body["version"] not in LOADERS
        or not isinstance(files, dict)
    ):
        raise BadInput(f"{INDEX}: found another table than version 1 to {VERSION} of an export")
    if not all(isinstance(digest, str) for digest in files.values()):
        raise BadInput(f"{INDEX} files: expected a digest for each")
    if missing := {MANIFEST, MEMBERS, CARD, FIGURES} - set(files):
        raise BadInput(f"{INDEX} files: found no {sorted(missing)[0]}")
    return dict(files)


def _check_files(folder: Path, expected: Mapping[str, str]) -> None:
    found = files_of(folder)
    for name in sorted(found - set(expected)):
        raise Refused(f"{name}: found a file that was not released")
    for name, digest in sorted(expected.items()):
        if name not in found:
            raise Refused(f"{name}: missing, expected the file that was released")
        if digest_of(folder, name) != digest:
            raise Refused(f"{name}: found other bytes than were released")
    for place, folders, files in os.walk(folder):
        if not folders and not files:
            raise Refused(
                f"{Path(place).relative_to(folder).as_posix()}: found an empty folder, expected"
                " none"
            )


def files_of(folder: Path) -> set[str]:
    """Every file but the index, by path; Refused for what is neither file nor folder of files."""
    found: set[str] = set()

    def unlisted(error: OSError) -> None:
        shown = Path(error.filename).relative_to(folder).as_posix()
        raise Refused(
            f"{shown}: can't be listed ({error.strerror}), expected a folder of the release"
        )

    for place, folders, files in os.walk(folder, onerror=unlisted):
        for name in (*folders, *files):
            path = Path(place) / name
            shown = path.relative_to(folder).as_posix()
            if not stat.S_ISDIR(path.lstat().st_mode):
                _check_plain(path, shown)
                found.add(shown)
        if len(found) > MAX_FILES:
            raise Refused(f"{folder}: found more than {MAX_FILES} files")
    return found - {INDEX}


def _institutions(body: Mapping[str, Any]) -> dict[str, Institution]:
    rows = body.get("institutions")
    if body.get("version") != MEMBERS_VERSION or not isinstance(rows, dict):
        raise BadInput(f"{MEMBERS}: found another table than version {MEMBERS_VERSION}")
    if strange := [name for name in rows if not NAME.fullmatch(name)]:
        raise BadInput(f"{MEMBERS}: found {strange[0][:80]!r}, expected institutions' names")
    found = {name: build(Institution, row, f"{MEMBERS} {name}") for name, row in rows.items()}
    keys = [key for each in found.values() for key in (each.identity, *each.others)]
    if len(set(keys)) != len(keys):
        raise Refused(f"{MEMBERS}: found one key for two institutions")
    return found


def _statements(
    folder: Path,
    manifest: RunManifest,
    institutions: Mapping[str, Institution],
    files: Mapping[str, str],
) -> dict[str, Consent]:
    """Every institution's own statement about this run."""
    names = {
        name.removeprefix(f"{STATEMENTS}/") for name in files if name.startswith(f"{STATEMENTS}/")
    }
    if other := names ^ {f"{name}.json" for name in institutions}:
        raise Refused(
            f"{STATEMENTS}/{sorted(other)[0]}: expected one statement of each institution"
        )
    if guarantee_of(manifest).private and len(institutions) < manifest.minimum_cohort:
        raise Refused(
            f"{MEMBERS}: found {len(institutions)}, expected at least {manifest.minimum_cohort}"
        )
    keys = {name: each.identity for name, each in institutions.items()}
    found = {}
    for name in institutions:
        where = f"{STATEMENTS}/{name}.json"
        statement: Statement = read_statement(_text(folder, where), where)
        found[name] = opened_consent(statement.signed, name, manifest, keys)
        if statement_text(found[name], statement.signed) != statement.text:
            raise Refused(f"{where}: found other words than were signed")
    return found


def opened_consent(
    data: bytes, name: str, manifest: RunManifest, keys: Mapping[str, PublicIdentity]
) -> Consent:
    """What institution `name` signed about this run, at what its schedule costs; Refused for else.

    `data` is the signed reply; `keys` are the members' by name.
    """
    where = f"{STATEMENTS}/{name}.json"
    reply = reply_from_bytes(data, manifest.federation, keys)
    if not isinstance(reply, Consent) or reply.institution != name:
        raise Refused(f"{where}: found no consent of {name}")
    if reply.manifest != manifest.digest:
        raise Refused(
            f"{where}: found a statement about {reply.manifest}, expected {manifest.digest}"
        )
    if faults := consent_faults(reply, manifest):
        raise Refused(f"{where} {'; '.join(faults)}")
    return reply


def _reports(
    folder: Path, institutions: Mapping[str, Institution], files: Mapping[str, str]
) -> list[str]:
    found = [name for name in sorted(files) if name.startswith(f"{REPORTS}/")]
    for where in found:
        name = where.removeprefix(f"{REPORTS}/").removesuffix(".json")
        if name not in institutions:
            raise Refused(f"{where}: found a report of nobody who took part")
        signer, who = unseal(_text(folder, where), REPORT_TAG, where).signer, institutions[name]
        if signer not in (who.identity, *who.others):
            raise Refused(f"{where}: found the key {signer.text}, expected one of {name}'s")
    return found


def _check_card(
    folder: Path,
    version: int,
    manifest: RunManifest,
    institutions: Mapping[str, Institution],
    statements: Mapping[str, Consent],
) -> None:
    """The card is the text that follows from what was signed: nobody writes another ε into it."""
    figures = json_table(_text(folder, FIGURES).encode(), FIGURES)
    if figures != shown_figures(figures):
        raise BadInput(f"{FIGURES}: found other figures than a card shows")
    found = _text(folder, CARD)
    rebuilt = rebuilt_card(manifest, institutions, statements, figures, version)
    if found != as_earlier(rebuilt, found, version):
        raise Refused(f"{CARD}: found another text than follows from what the institutions signed")


def rebuilt_card(
    manifest: RunManifest,
    institutions: Mapping[str, Institution],
    statements: Mapping[str, Consent],
    figures: Mapping[str, Any],
    version: int = VERSION,
) -> str:
    """The card that a release of this `version` has."""
    organisations = {name: each.organisation for name, each in sorted(institutions.items())}
    return model_card(manifest, organisations, dict(sorted(statements.items())), figures, version)


def _check_adapter(folder: Path, manifest: RunManifest) -> str:
    """The adapter's digest, from its tensors; Refused where the manifest's run makes another."""
    if other := sorted({path.name for path in (folder / ADAPTER).iterdir()} - set(ADAPTER_FILES)):
        raise Refused(f"{ADAPTER}/{other[0]}: found a file that no adapter has")
    description, state = read_adapter(folder)
    network = replace(manifest.network, targets=tuple(sorted(manifest.network.targets)))
    for name, found, expected in (
        ("spec_digest", state.spec.digest, manifest.spec_digest),
        ("base_digest", description.base_digest, manifest.base_digest),
        ("projection_digest", description.projection_digest, manifest.projection_digest),
        ("task", description.task, manifest.task),
        ("labels", description.labels, manifest.labels),
        ("max_length", description.max_length, manifest.max_length),
        ("seed", description.seed, manifest.seed),
        *(
            (each.name, getattr(description, each.name), getattr(network, each.name))
            for each in fields(AdapterLayout)
        ),
    ):
        if found != expected:
            raise Refused(
                f"{ADAPTER} {name}: found {str(found)[:80]}, expected {str(expected)[:80]}"
            )
    return state.digest


def read_adapter(folder: Path) -> tuple[Description, AdapterState]:
    """The adapter of an export and its description; Refused, which names files within it."""
    try:
        return read_released(folder / ADAPTER)
    except BadInput as error:
        raise Refused(str(error).replace(f"{folder}/", "")) from error


def _sealed(folder: Path, name: str, tag: str, expected: PublicIdentity | None) -> Signed:
    try:
        return unseal(_text(folder, name), tag, name, expected)
    except Refused as error:
        fault = str(error)
        raise Refused(fault if name in fault else f"{name}: {fault}") from error


def _text(folder: Path, name: str) -> str:
    limit = MAX_MESSAGE_BYTES if name == MANIFEST else MAX_TEXT_BYTES
    expected = "what an export has"
    try:
        _check_plain(folder / name, name)
    except OSError as error:
        raise BadInput(f"{name}: can't be read ({error.strerror}), expected {expected}") from error
    return read_text(folder / name, limit, expected, where=name)


def _check_plain(path: Path, name: str) -> None:
    """Refused before it is opened: a pipe would never answer, and a link leads elsewhere."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise Refused(f"{name}: found a link or a device, expected plain files")


def digest_of(folder: Path, name: str) -> str:
    """`sha256:` and the hash of a file of an export; Refused where it cannot be read."""
    try:
        with (folder / name).open("rb") as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise Refused(
            f"{name}: can't be read ({error.strerror}), expected what was released"
        ) from error
