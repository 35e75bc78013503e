"""What a release's folder holds, file by file, and the tags that its texts are signed under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.trust.identity import PublicIdentity

RELEASE_TAG = "fedlora-release-1"
# no offer: whoever has an export can't make a node consent
RELEASE_MANIFEST_TAG = "fedlora-release-manifest-1"
EXPORT_MEMBERS_TAG = "fedlora-release-members-1"
REPORT_TAG = "fedlora-node-report-1"
# of release.json; 1: the card names load_adapter by another place; 1 and 2: Opacus computed ε; 1 to
# 3: the card does not say what was learnt from public records
VERSION = 4
MEMBERS_VERSION = 1
INDEX, MANIFEST, MEMBERS, CARD = "release.json", "manifest.json", "members.json", "README.md"
FIGURES = "figures.json"
ADAPTER, STATEMENTS, REPORTS = "adapter", "statements", "reports"
MAX_FILES = 10_000


@dataclass(frozen=True)
class Institution:
    """A member that took part, as it was enrolled."""

    organisation: str
    identity: PublicIdentity  # whose signature its statement has
    # its keys before and after: a later report has a later one
    others: tuple[PublicIdentity, ...] = ()


@dataclass(frozen=True)
class Release:
    """What an export is made of.

    `statements` are the exact bytes that each institution signed (`messages.Started`;
    `Consent` of a run from before there were starts).
    """

    manifest: RunManifest
    institutions: Mapping[str, Institution]
    statements: Mapping[str, bytes]
    adapter: str  # digest of the state that the run committed last
    # of summary.json; what a card shows of them
    figures: Mapping[str, Any] = field(default_factory=dict)
    # sealed texts of `fedlora-node report`
    reports: Mapping[str, str] = field(default_factory=dict)
