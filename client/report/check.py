"""Is a node's report the one that its institution signed? For this the core is enough."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedlora.common.disk.files import read_text
from fedlora.common.errors import Refused
from fedlora.common.trust.enrolment import request_from_text
from fedlora.common.trust.identity import MAX_TEXT_BYTES, PublicIdentity, Signed, unseal

REPORT_TAG = "fedlora-node-report-1"
REPORT, PAGE = "report.json", "report.html"


def check_report(folder: Path, expected: PublicIdentity | None = None) -> PublicIdentity:
    """Who signed the report in `folder`; Refused unless its two files are as written, and alone."""
    sealed = read_report(folder / REPORT, expected)
    found = sorted(path.name for path in folder.iterdir())
    if found != sorted((REPORT, PAGE)):
        raise Refused(
            f"{folder}: found {', '.join(found)[:200]}, expected {REPORT} and {PAGE} alone"
        )
    digest = hashlib.sha256((folder / PAGE).read_bytes()).hexdigest()
    if digest != sealed.table.get("page_sha256"):
        raise Refused(f"{folder / PAGE}: found another page than the one whose digest was signed")
    return sealed.signer


def read_key(path: Path) -> PublicIdentity:
    """A node's public key: as `ed25519:` and base64, or in its enrolment request."""
    text = read_text(path)
    if text.lstrip().startswith("{"):
        return request_from_text(text, path.name).identity
    return PublicIdentity.from_text(text.strip(), path.name)


def read_report(path: Path, expected: PublicIdentity | None = None) -> Signed:
    """A report; Refused where one byte is not as it was signed."""
    return unseal(read_text(path, MAX_TEXT_BYTES, "a report"), REPORT_TAG, path.name, expected)
