"""Nothing about an export can change unnoticed: no byte, no file, no institution's word."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.manifest.manifest import EvaluationTerms, SecureTerms, SkellamTerms
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.privacy.shared_record_level import SharedRecordLevel
from fedlora.common.protocol.messages import MANIFEST_TAG, Consent, reply_from_bytes
from fedlora.common.trust.identity import Identity, seal, unseal
from fedlora.server.release.card import model_card, shown_figures
from fedlora.server.release.export import export
from fedlora.server.release.layout import (
    EXPORT_MEMBERS_TAG,
    INDEX,
    RELEASE_MANIFEST_TAG,
    RELEASE_TAG,
    VERSION,
    Release,
)
from fedlora.server.release.signed_consents import statement_text
from fedlora.server.release.verify import digest_of, files_of, verify
from tests.server.releases import (
    SPEC,
    STATE,
    Party,
    adapter,
    consent,
    cost,
    exported,
    manifest,
    party,
    release,
)


@pytest.fixture
def of() -> Party:
    return party()


@pytest.fixture
def folder(tmp_path: Path, of: Party) -> Path:
    return exported(tmp_path, of)


def test_a_release_of_records_with_shared_noise_verifies_and_says_what_it_rests_on(
    tmp_path: Path,
) -> None:
    """Three institutions: two carry the noise. None may state less than the schedule costs."""
    of = Party(
        Identity.generate(), {name: Identity.generate() for name in ("north", "south", "west")}
    )
    plain = manifest("shared-record")
    bounds = tuple(SharedRecordLevel.coordinate_bound(phase) for phase in plain.phases)
    run = replace(
        plain,
        minimum_cohort=3,
        largest_cohort=3,
        secure=SecureTerms("2n/3+1", 1, 4, 32, 1 << 24, bounds),
        skellam=SkellamTerms((SPEC.size,), 2),
    )
    export(tmp_path / "export", of.coordinator, release(of, run), adapter(tmp_path / "adapter"))
    lines = verify(tmp_path / "export", of.coordinator.public)
    assert lines[-1] == "verified with the coordinator's key"
    card = (tmp_path / "export" / "README.md").read_text()
    assert "at least 2, carry all of the noise" in card and "If all other institutions" in card
    less = replace(release(of, run), statements={})
    low = {name: consent(who, name, run, cost(run) / 2) for name, who in of.members.items()}
    with pytest.raises(FedloraError, match="what the schedule costs"):
        export(
            tmp_path / "low",
            of.coordinator,
            replace(less, statements=low),
            adapter(tmp_path / "again"),
        )


@pytest.mark.parametrize("version", [0, 1, VERSION + 1, True, "2"])
def test_a_release_has_a_known_version_and_its_card(
    folder: Path, of: Party, version: object
) -> None:
    files = {name: digest_of(folder, name) for name in files_of(folder)}
    table = {"version": version, "files": files}
    (folder / INDEX).write_text(seal(of.coordinator, RELEASE_TAG, table))
    expected = "README.md" if type(version) is int and version == 1 else "another table"
    with pytest.raises(FedloraError, match=expected):
        verify(folder, of.coordinator.public)


def test_a_card_says_what_was_learnt_from_public_records(of: Party, tmp_path: Path) -> None:
    """A release of version 3 has the figure at most, and no sentence."""
    given = replace(release(of, manifest()), figures={"public_records": 4_000, "rounds": 2})
    export(tmp_path / "export", of.coordinator, given, adapter(tmp_path / "adapter"))
    said = "learnt from 4000 public records"
    assert said in (tmp_path / "export" / "README.md").read_text()
    verify(tmp_path / "export", of.coordinator.public)
    names = dict.fromkeys(of.members, "clinic")
    stated = {name: Consent(name, manifest().digest, "sha256:p", 1.52, 1e-5) for name in names}
    for version in (3, 4):
        card = model_card(manifest(), names, stated, given.figures, version)
        assert (said in card) == (version == 4)


def test_an_export_verifies_as_it_was_written(folder: Path, of: Party) -> None:
    lines = verify(folder, of.coordinator.public)
    assert lines[-1] == "verified with the coordinator's key"
    assert (
        lines[0].startswith("files        12 ")
        and "2, each signed" in lines[3]
        and "1.52" in lines[3]
    )
    assert STATE.digest in lines[2]
    assert {path.name for path in folder.parent.iterdir()} == {"adapter", "export"}
    card = (folder / "README.md").read_text()
    assert "| north | north    b clinic /b  | 1.52 | 1e-05 |" in card and "0.8123" in card
    assert "(1.52, 1e-05)-differentially private" in card


def test_without_a_key_only_integrity_is_claimed(folder: Path, of: Party) -> None:
    lines = verify(folder)
    assert of.coordinator.public.fingerprint in lines[-2] and "integrity only" in lines[-1]
    with pytest.raises(Refused, match=r"release\.json: found the key"):
        verify(folder, Identity.generate().public)


def test_two_hundred_flipped_bytes_are_two_hundred_detected(folder: Path, of: Party) -> None:
    """Over each file in turn, at random places and bits."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == 13
    chance = random.Random(3)
    for change in range(200):
        path = files[change % len(files)]
        data = path.read_bytes()
        place, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        for key in (of.coordinator.public, None):
            with pytest.raises(FedloraError, match=re.escape(path.name)):
                verify(folder, key)
        path.write_bytes(data)
    verify(folder, of.coordinator.public)


@pytest.mark.parametrize(
    "place", ["extra.txt", "adapter/evil.py", "statements/west.json", ".hidden", "new/x"]
)
def test_an_added_file_is_named(folder: Path, of: Party, place: str) -> None:
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text("x")
    with pytest.raises(Refused, match=re.escape(place)):
        verify(folder, of.coordinator.public)


def test_every_removed_file_is_named(folder: Path, of: Party) -> None:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(FedloraError, match=re.escape(path.name)):
            verify(folder, of.coordinator.public)
        path.write_bytes(data)


def test_links_and_empty_folders_are_refused(folder: Path, of: Party, tmp_path: Path) -> None:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        shutil.copy(path, tmp_path / "same")  # the same bytes, elsewhere
        data = path.read_bytes()
        path.unlink()
        path.symlink_to(tmp_path / "same")
        with pytest.raises(Refused, match=re.escape(path.name) + ": found a link"):
            verify(folder, of.coordinator.public)
        path.unlink()
        path.write_bytes(data)
    (folder / "adapter").rename(tmp_path / "moved")
    (folder / "adapter").symlink_to(tmp_path / "moved")
    with pytest.raises(Refused, match="adapter: found a link"):
        verify(folder, of.coordinator.public)
    (folder / "adapter").unlink()
    (tmp_path / "moved").rename(folder / "adapter")
    (folder / "empty").mkdir()
    with pytest.raises(Refused, match="empty"):
        verify(folder, of.coordinator.public)


def test_what_can_not_be_listed_is_named(
    folder: Path, of: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that nobody may list could hide what was added."""
    scan = os.scandir

    def closed(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "adapter":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(Refused, match=r"^adapter: can't be listed"):
        verify(folder, of.coordinator.public)


@pytest.mark.parametrize("name", ["README.md", "adapter/spec.json"])
def test_what_can_not_be_read_is_named(
    folder: Path, of: Party, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opened = Path.open

    def closed(path: Path, mode: str = "r") -> object:
        if path == folder / name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(Refused, match=f"^{name}: can't be read"):
        verify(folder, of.coordinator.public)


@pytest.mark.parametrize("name", ["release.json", "README.md", "adapter/spec.json"])
def test_a_pipe_is_not_waited_for(folder: Path, of: Party, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(Refused, match=f"{name}: found a link or a device"):
        verify(folder, of.coordinator.public)


def resigned(folder: Path, of: Party) -> None:
    """What a dishonest coordinator can do: sign the digests of whatever it wrote."""
    files = {name: digest_of(folder, name) for name in files_of(folder)}
    (folder / INDEX).write_text(
        seal(of.coordinator, RELEASE_TAG, {"version": VERSION, "files": files})
    )


def smaller_epsilon_in_the_card(folder: Path, of: Party) -> None:
    path = folder / "README.md"
    path.write_text(path.read_text().replace("1.52", "0.5"))


def smaller_epsilon_in_a_statement(folder: Path, of: Party) -> None:
    path = folder / "statements" / "north.json"
    path.write_text(path.read_text().replace("1.5199", "0.5"))


def another_promise_in_the_card(folder: Path, of: Party) -> None:
    path = folder / "README.md"
    path.write_text(
        path.read_text()
        + "\nEach institution's updates are (0.05, 1e-12)-differentially private.\n"
    )


def signed_at(folder: Path, of: Party, epsilon: float) -> Consent:
    """The statement that north signs at `epsilon`, in the place of its own."""
    signed = consent(of.members["north"], "north", manifest(), epsilon)
    said = reply_from_bytes(signed, "bank-intents", {"north": of.members["north"].public})
    assert isinstance(said, Consent)
    (folder / "statements" / "north.json").write_text(statement_text(said, signed))
    return said


def a_smaller_epsilon_that_was_signed(folder: Path, of: Party) -> None:
    """An institution that understates what its schedule costs, or sides with the coordinator."""
    signed_at(folder, of, 0.01)


def a_larger_epsilon_that_was_signed(folder: Path, of: Party) -> None:
    """An institution whose word would be the headline of all; the card says it too."""
    north = signed_at(folder, of, 1e6)
    statements = {
        "north": north,
        "south": replace(north, institution="south", epsilon=cost(manifest())),
    }
    organisations = {name: each.organisation for name, each in release(of).institutions.items()}
    figures = json.loads((folder / "figures.json").read_text())
    (folder / "README.md").write_text(model_card(manifest(), organisations, statements, figures))


def nobody_at_all(folder: Path, of: Party) -> None:
    shutil.rmtree(folder / "statements")
    shutil.rmtree(folder / "reports")
    body = {"version": 1, "institutions": {}}
    (folder / "members.json").write_text(seal(of.coordinator, EXPORT_MEMBERS_TAG, body))


def statement_of_another_run(folder: Path, of: Party) -> None:
    path, other = folder / "statements" / "north.json", manifest(run="r2")
    table = json.loads(path.read_text())
    table["signed"] = base64.b64encode(consent(of.members["north"], "north", other)).decode()
    path.write_text(json.dumps(table))


def anothers_statement(folder: Path, of: Party) -> None:
    shutil.copy(folder / "statements" / "south.json", folder / "statements" / "north.json")


def a_statement_less(folder: Path, of: Party) -> None:
    (folder / "statements" / "north.json").unlink()


def anothers_report(folder: Path, of: Party) -> None:
    (folder / "reports" / "north.json").rename(folder / "reports" / "south.json")


def another_base(folder: Path, of: Party) -> None:
    (folder / "adapter" / "fedlora.json").write_text('{"base_digest": "sha256:0"}')


def no_description(folder: Path, of: Party) -> None:
    """An adapter of any base, rank or labels."""
    (folder / "adapter" / "fedlora.json").unlink()


def no_spec(folder: Path, of: Party) -> None:
    (folder / "adapter" / "spec.json").unlink()


def other_weights(folder: Path, of: Party) -> None:
    described = (folder / "adapter" / "fedlora.json").read_bytes()
    adapter(folder / "adapter", state=AdapterState(SPEC, 2 * STATE.vector))
    (folder / "adapter" / "fedlora.json").write_bytes(described)


def another_network(folder: Path, of: Party) -> None:
    spec = AdapterSpec((*SPEC.tensors, TensorSpec("head.bias", (2,))))
    adapter(folder / "adapter", state=AdapterState.zeros(spec))


def other_labels(folder: Path, of: Party) -> None:
    adapter(folder / "adapter", labels=("loan", "card"))


def another_rank(folder: Path, of: Party) -> None:
    adapter(folder / "adapter", rank=9)


def another_scale(folder: Path, of: Party) -> None:
    """PEFT would multiply what the manifest's network does not."""
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))


def another_length(folder: Path, of: Party) -> None:
    adapter(folder / "adapter", max_length=512)


def code_beside_it(folder: Path, of: Party) -> None:
    (folder / "adapter" / "modeling.py").write_text("print()")


def another_manifest(folder: Path, of: Party) -> None:
    path = folder / "manifest.json"
    body = dict(unseal(path.read_text(), RELEASE_MANIFEST_TAG, "m").table) | {"epsilon": 0.5}
    path.write_text(seal(of.coordinator, RELEASE_MANIFEST_TAG, body))


@pytest.mark.parametrize(
    "lie",
    [
        smaller_epsilon_in_the_card,
        smaller_epsilon_in_a_statement,
        another_promise_in_the_card,
        a_smaller_epsilon_that_was_signed,
        a_larger_epsilon_that_was_signed,
        nobody_at_all,
        statement_of_another_run,
        anothers_statement,
        a_statement_less,
        anothers_report,
        another_base,
        no_description,
        no_spec,
        other_weights,
        another_network,
        other_labels,
        another_rank,
        another_scale,
        another_length,
        code_beside_it,
        another_manifest,
    ],
)
def test_a_coordinator_can_not_speak_for_an_institution(
    folder: Path, of: Party, lie: Callable[[Path, Party], None]
) -> None:
    resigned(folder, of)
    verify(folder, of.coordinator.public)  # the control: signing anew alone changes nothing
    lie(folder, of)
    resigned(folder, of)
    with pytest.raises(FedloraError):
        verify(folder, of.coordinator.public)


EVIL = "north\nverified with the coordinator's key\x1b[8m"


def test_whoever_exported_can_not_write_lines_or_codes_on_a_terminal(
    tmp_path: Path, of: Party
) -> None:
    """What is said of an export that a stranger signed.

    Of each field, and of the names of its files.
    """
    run = replace(manifest(), federation=EVIL)
    with pytest.raises(FedloraError) as caught:
        export(tmp_path / "e", of.coordinator, release(of, run), adapter(tmp_path / "a"))
    assert (
        "manifest.json federation: found" in str(caught.value) and str(caught.value).isprintable()
    )
    folder = exported(tmp_path, of)
    (folder / EVIL).touch()
    with pytest.raises(Refused) as found:
        verify(folder)
    assert str(found.value).isprintable() and "not released" in str(found.value)
    (folder / EVIL).unlink()
    body = {"version": 1, "institutions": {EVIL: {}}}
    (folder / "members.json").write_text(seal(of.coordinator, EXPORT_MEMBERS_TAG, body))
    resigned(folder, of)
    with pytest.raises(BadInput) as named:
        verify(folder)
    assert str(named.value).isprintable() and "members.json" in str(named.value)


def test_where_the_base_lay_is_not_released(tmp_path: Path, of: Party) -> None:
    files = adapter(tmp_path / "adapter", base="/home/somebody/models/bert")
    export(tmp_path / "export", of.coordinator, release(of), files)
    assert (
        json.loads((tmp_path / "export" / "adapter" / "fedlora.json").read_text())["base"] == "bert"
    )
    assert not any(b"somebody" in path.read_bytes() for path in (tmp_path / "export").rglob("*.*"))
    assert json.loads((files / "fedlora.json").read_text())["base"] == "/home/somebody/models/bert"
    shutil.copy(files / "fedlora.json", tmp_path / "elsewhere")
    (files / "fedlora.json").unlink()
    (files / "fedlora.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match=r"adapter/fedlora\.json: found a link"):
        export(tmp_path / "e", of.coordinator, release(of), files)


def test_faulty_releases_are_not_written(tmp_path: Path, of: Party) -> None:
    whole, files = release(of), adapter(tmp_path / "adapter")

    def refused(wrong: Release, fault: str, source: Path = files) -> None:
        with pytest.raises(FedloraError, match=fault):
            export(tmp_path / "export", of.coordinator, wrong, source)
        assert not (tmp_path / "export").exists()

    forged = dict(whole.statements) | {
        "north": consent(of.members["south"], "north", whole.manifest)
    }
    refused(replace(whole, statements=forged), "signature")
    absurd = dict(whole.statements) | {
        "north": consent(of.members["north"], "north", whole.manifest, 1.7e308)
    }
    refused(
        replace(whole, statements=absurd), r"north.json epsilon: found 1.7e\+308, expected 1.51997"
    )
    unpaid = dict(whole.statements) | {
        "north": consent(of.members["north"], "north", whole.manifest, 0.0)
    }
    refused(replace(whole, statements=unpaid), "epsilon")
    missing = {"north": whole.statements["north"]}
    refused(replace(whole, statements=missing), "south")
    refused(replace(whole, reports={"east": ""}), "members only")
    refused(whole, "adapter_config", tmp_path)
    refused(whole, "base_digest", adapter(tmp_path / "other", base_digest="sha256:0"))
    later = adapter(tmp_path / "later", state=AdapterState.zeros(SPEC))
    refused(whole, f"expected {STATE.digest}, which the run committed", later)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "x").write_text("")
    with pytest.raises(BadInput, match="found something there"):
        export(tmp_path / "export", of.coordinator, whole, files)


def test_a_run_without_privacy_says_so(tmp_path: Path, of: Party) -> None:
    run = manifest("none")
    plain = replace(
        release(of, run), statements={n: consent(i, n, run, 0.0) for n, i in of.members.items()}
    )
    export(tmp_path / "export", of.coordinator, plain, adapter(tmp_path / "adapter"))
    assert "without privacy" in (tmp_path / "export" / "README.md").read_text()


def test_a_release_tells_of_hold_outs_what_is_signed_and_no_more(tmp_path: Path, of: Party) -> None:
    run = replace(manifest(), evaluation=EvaluationTerms(0.2, 1, 99.0, 6.0, ("right",)))
    row = {"units": 99.5, "accuracy": 0.75, "error": 0.03}
    figures = {"together": row, "lowest": row, "spread": 0.01, "institutions": {"north": row}}
    made = replace(release(of, run), figures={"rounds": 3, "evaluation": figures})
    export(tmp_path / "export", of.coordinator, made, adapter(tmp_path / "adapter"))
    lines = verify(tmp_path / "export", of.coordinator.public)
    assert any("evaluation   counts (right) of 20%, within that ε" in line for line in lines)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "| accuracy, lowest institution | 0.75 ± 0.03 |" in card
    assert "did not train on" in card and "north" not in card.split("Measured at")[1]
    masked = {"together": row, "lowest": None, "spread": None, "institutions": {}}
    assert shown_figures({"evaluation": masked}) == {"evaluation": {"together": row}}
    assert shown_figures({"evaluation": {"lost": "away"}}) == {"evaluation": {}}


def test_an_export_is_no_offer(folder: Path, of: Party) -> None:
    """Else whoever has one could make a node that was never asked reserve the run's ε."""
    with pytest.raises(Refused):
        unseal(
            (folder / "manifest.json").read_text(),
            MANIFEST_TAG,
            "manifest.json",
            of.coordinator.public,
        )
