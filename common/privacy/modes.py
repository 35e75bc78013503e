"""Which guarantee a name stands for: the one place where a mode is read.

A new way to promise is one class, and one line here; the configuration's schema names it too.
"""

from __future__ import annotations

from fedlora.common.config.schema import PrivacyConfig
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.guarantee import Guarantee
from fedlora.common.privacy.institution_level import InstitutionLevel
from fedlora.common.privacy.record_level import RecordLevel
from fedlora.common.privacy.shared_record_level import SharedRecordLevel
from fedlora.common.privacy.unprotected import Unprotected

GUARANTEES: dict[str, type[Guarantee]] = {
    each.name: each for each in (RecordLevel, SharedRecordLevel, InstitutionLevel, Unprotected)
}
# a configuration's mode and noise, where the mode alone is another guarantee
_ASKED: dict[tuple[str, str], type[Guarantee]] = {("record", "shared"): SharedRecordLevel}
EXPECTED = " or ".join(", ".join(GUARANTEES).rsplit(", ", 1))  # in words


def guarantee_named(mode: str) -> type[Guarantee]:
    """BadInput for a name that is none, whatever it would have meant elsewhere."""
    if mode not in GUARANTEES:
        raise BadInput(f"manifest mode: found {mode!r}, expected {EXPECTED}")
    return GUARANTEES[mode]


def guarantee_asked(privacy: PrivacyConfig) -> type[Guarantee]:
    """What a configuration asks for."""
    return _ASKED.get((privacy.mode, privacy.noise)) or guarantee_named(privacy.mode)


def guarantee_of(manifest: RunManifest) -> Guarantee:
    """What a manifest's run promises; BadInput where its mode is none that is known."""
    return guarantee_named(manifest.mode)(manifest)
