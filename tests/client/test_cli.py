"""The institution's commands: each fault one line that names it, each answer all one must know."""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedlora.client import cli
from fedlora.client.node import enrolment
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import TrainerPolicy
from fedlora.client.service.endpoint import _bind
from fedlora.common.errors import BadInput
from fedlora.common.model.base import base_digest
from fedlora.common.protocol.messages import MANIFEST_TAG
from fedlora.common.tasks import media_classification
from fedlora.common.trust.identity import Signed
from tests.client.institution import COORDINATOR, POLICY, Institution, manifest_of
from tests.media import png


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    monkeypatch.setattr(sys, "argv", ["fedlora-node", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def north(tmp_path: Path, tiny_bert: Path) -> Institution:
    made = Institution(tmp_path / "node")
    made.ledger.close()
    made.set_policy(POLICY.format(base=base_digest(tiny_bert), folder=tiny_bert))
    rows = [json.dumps({"text": f"w{k} good", "label": "ab"[k % 2]}) for k in range(8)]
    (made.root / "notes.jsonl").write_text("\n".join(rows))
    return made


def test_a_file_where_a_folder_must_be_is_one_line(
    north: Institution,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "f"
    file.touch()
    node = ("--node", str(north.root))
    for words in (
        ("init", "x", "--organisation", "o", "--node", str(file / "x")),
        ("join", str(file / "x"), *node),
        ("join", str(file / "x"), "--approve", *node),
        ("report", *node, "--out", str(file)),
    ):
        code, _, err = run(capsys, monkeypatch, *words)
        assert code == 2 and len(err.splitlines()) == 1 and str(file) in err, err
        assert ", expected " in err, err
    north.set_policy(north.folder.policy.read_text() + '[trainer]\nhead = "node.toml/head.json"\n')
    code, _, err = run(capsys, monkeypatch, "ledger", *node)
    assert code == 3 and len(err.splitlines()) == 1 and "node.toml" in err, err


def test_a_damaged_roster_or_manifest_is_named(
    north: Institution, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = ("--node", str(north.root))
    north.folder.peers.write_text("a=" + "[" * 20_000)
    code, _, err = run(capsys, monkeypatch, "join", "x", "--remove", *node)
    assert code == 2 and len(err.splitlines()) == 1 and "peers.toml: found no roster" in err, err
    north.folder.peers.unlink()
    kept = north.folder.runs / "ab" / "manifest.signed"
    kept.parent.mkdir(parents=True)
    signed = Signed.by(COORDINATOR, MANIFEST_TAG, manifest_of().to_bytes()).to_bytes()
    for data, expected in (
        (b"x" * 5, 2),
        (b"x" * 500, 3),
        (signed[:-1], 3),
        (signed[:-1] + b"x", 3),
    ):
        kept.write_bytes(data)
        code, _, err = run(capsys, monkeypatch, "serve", *node)
        assert code == expected and len(err.splitlines()) == 1 and f": {kept}: " in err, err


def test_a_manifest_can_not_write_codes_on_a_terminal(
    north: Institution,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "m.json"
    file.write_bytes(
        replace(manifest_of(), run="r\x1b[8m", strategy="s\x1b[8m", task="t\x1b[8m").to_bytes()
    )
    monkeypatch.setattr(cli, "console", Console(width=300))
    code, out, err = run(
        capsys, monkeypatch, "policy", "explain", str(file), "--node", str(north.root)
    )
    assert code == 3 and "r [8m" in out and "task = t [8m" in err and "\x1b" not in out + err


@pytest.mark.parametrize(
    ("row", "match"),
    [
        pytest.param('{"text": "", "label": "a"}', "row 9", id="data-nothing-after-tokenisation"),
        pytest.param('{"text": "x", "label": null}', "row 9 label", id="data-null-label"),
    ],
)
def test_check_data_names_the_row(
    north: Institution,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    row: str,
    match: str,
) -> None:
    words = ("check-data", "--node", str(north.root))
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and "notes: 8 records, 8 units, charges people" in out
    with (north.root / "notes.jsonl").open("a") as stream:
        stream.write("\n" + row)
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 2 and match in err, err


def test_check_data_shows_the_sizes_of_images(
    north: Institution,
    tiny_vit: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = POLICY.format(base=base_digest(tiny_vit), folder=tiny_vit)
    images = 'task = "image-classification"\nimage = "file"\n[bases]'
    north.set_policy(text.replace("[bases]", images))
    rng, rows = np.random.default_rng(0), []
    for number in range(8):
        (north.root / f"{number}.png").write_bytes(png(rng))
        rows.append(json.dumps({"file": f"{number}.png", "label": "ab"[number % 2]}) + "\n")
    (north.root / "notes.jsonl").write_text("".join(rows))
    words = ("check-data", "--node", str(north.root))
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 0 and "notes: 8 records, 8 units, charges people" in out, err
    assert "images: 40 to 40 pixels wide" in out and "0.png -> a" in out
    assert "  tried for image-classification\n" in out
    with monkeypatch.context() as full:
        full.setattr(media_classification, "free_memory", lambda: 4 * 8 * 3 * 32 * 32 - 1)
        code, _, err = run(capsys, monkeypatch, *words)
    assert code == 2 and "found 8 records that take 0 MB once read, expected at most" in err, err
    (north.root / "5.png").write_bytes(b"none")
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 2 and "notes.jsonl row 6 image 5.png: found no image" in err, err


def test_check_data_says_how_many_units_were_spelled_in_several_ways(
    north: Institution, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = north.folder.policy.read_text()
    north.set_policy(text.replace("[bases]", 'unit = "who"\n[bases]'))
    names = [f"person {k // 2}" for k in range(16)] + ["Person  3", "PERSON 4"]
    rows = [json.dumps({"text": "good", "label": "a", "who": name}) for name in names]
    (north.root / "notes.jsonl").write_text("\n".join(rows))
    code, out, _ = run(capsys, monkeypatch, "check-data", "--node", str(north.root))
    assert code == 0 and "notes: 18 records, 8 units" in out
    assert "  notes.jsonl: 2 units were spelled in several ways" in out


def test_check_data_reads_the_texts_of_a_pair_apart_as_runs_do(
    north: Institution, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has half of a record's length, so that a long one is cut beside a short one."""
    text = north.folder.policy.read_text()
    north.set_policy(text.replace("[bases]", 'text = ["one", "two"]\n[bases]'))
    rows = [{"one": "good " * 300, "two": "bad", "label": "a"} for _ in range(16)]
    (north.root / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run(capsys, monkeypatch, "check-data", "--node", str(north.root))
    assert code == 0 and "cut to fit: the first text of 16" in out, out + err


def test_a_link_out_of_the_data_folder_is_refused(  # data-symlink-outside-root
    north: Institution,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes = north.root / "notes.jsonl"
    notes.rename(tmp_path / "elsewhere.jsonl")
    notes.symlink_to(tmp_path / "elsewhere.jsonl")
    code, _, err = run(capsys, monkeypatch, "check-data", "--node", str(north.root))
    assert code == 2 and "outside node" in err, err


def test_bases_lie_in_the_nodes_folder_first_and_have_a_digest_to_print(
    north: Institution,
    tiny_bert: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (north.root / "models").mkdir()
    (north.root / "models" / "encoder").symlink_to(tiny_bert)
    north.set_policy(POLICY.format(base=base_digest(tiny_bert), folder="models/encoder"))
    code, out, err = run(capsys, monkeypatch, "check-data", "--node", str(north.root))
    assert code == 0 and "models/encoder: sha256:" in out, err
    assert run(capsys, monkeypatch, "base", str(tiny_bert))[:2] == (
        0,
        base_digest(tiny_bert) + "\n",
    )
    code, _, err = run(capsys, monkeypatch, "base", "no-such-folder")
    assert code == 2 and len(err.splitlines()) == 1


def test_check_data_tries_each_base_and_says_what_it_can_not_serve(
    north: Institution,
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("check-data", "--node", str(north.root))
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 0 and "  tried for sequence-classification\n" in out, err
    folder = shutil.copytree(tiny_bert, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.1.attention.self.query.bias")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    north.set_policy(POLICY.format(base=base_digest(folder), folder=folder))
    code, out, err = run(capsys, monkeypatch, *words)
    lost = "no weights in the files for encoder.layer.1.attention.self.query.bias"
    assert code == 2 and len(err.splitlines()) == 1 and lost in err
    assert f"  not for sequence-classification: [model] base = {folder}: found {lost}" in out
    assert (
        not (north.root / "ledger.sqlite").exists()
        or not north.folder.open_ledger(north.folder.load_policy()).spent("people").epsilon
    )


@pytest.mark.parametrize("name", ["identity.pem", "relay"])
def test_only_a_socket_makes_room_for_the_trainers(north: Institution, name: str) -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(BadInput, match="expected a socket or nothing"),
    ):
        _bind(grpc.server(pool), TrainerPolicy(listen=f"unix:{name}"), north.root)
    assert (north.root / name).exists()


def test_explain_says_what_is_spent_and_names_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    north, asked, file = Institution(tmp_path / "n"), manifest_of(), tmp_path / "m.json"
    monkeypatch.setattr(cli, "console", Console(width=300))
    north.set_policy(north.folder.policy.read_text().replace("epsilon = 2.0", "epsilon = 0.3"))
    file.write_bytes(asked.to_bytes())
    words = ("policy", "explain", str(file), "--node", str(north.root))
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and "0 went to other runs" in out and "would be left" in out, out
    north.restart()
    north.begin(asked)
    assert 2 * north.ledger.spent("people").epsilon > 0.3, "it fits once"
    north.ledger.close()
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and "reserved before" in out, out
    for data in (b"", b"{", asked.to_bytes()[:-9], b"x" * 300):
        file.write_bytes(data)
        code, _, err = run(capsys, monkeypatch, *words)
        assert code == 2 and str(file) in err, err


def test_no_manifest_moves_the_terminals_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    north, file = Institution(tmp_path / "n"), tmp_path / "m.json"
    north.ledger.close()
    hidden = "\x1b[2J\x1b[Hall allowed\x1b[8m"
    words = ("policy", "explain", str(file), "--node", str(north.root))
    asked = manifest_of(run=hidden, federation=hidden, strategy="x\ny\x1b]0;title\x07", task=hidden)
    file.write_bytes(asked.to_bytes())
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 3 and "deny" in out and len(err.splitlines()) == 1
    assert "\x1b" not in out + err and "\x07" not in out
    file.write_bytes(asked.to_bytes().replace(b'"run":', b'"\\u001b[2J\\nrun":'))
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 2 and "\x1b" not in out + err, err
    assert all(line.startswith("fedlora-node: ") for line in err.splitlines())


def test_the_ledger_tells_what_a_budget_spent_that_the_policy_has_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    north = Institution(tmp_path / "n")
    north.begin(manifest_of())
    north.ledger.close()
    words = ("ledger", "--node", str(north.root))
    assert run(capsys, monkeypatch, *words)[1].startswith(
        "people: ε 0.191 of 2, δ 1e-05 of 0.0001\n"
    )
    north.set_policy(north.folder.policy.read_text().replace("people", "persons"))
    _, out, _ = run(capsys, monkeypatch, *words)
    assert out.startswith(
        "persons: ε 0 of 2, δ 0 of 0.0001\npeople: ε 0.191, δ 1e-05, no longer in the policy\n"
    )


def test_peers_are_told_by_name_when_they_come_and_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    north, south = Institution(tmp_path / "n"), NodeFolder(tmp_path / "s")
    request = enrolment.init(south, "south", "Süd Klinik")
    node = ("--node", str(north.root))
    _, out, _ = run(capsys, monkeypatch, "join", str(south.request), "--approve", *node)
    assert (
        "approved south (Süd Klinik); compare by telephone" in out
        and request.identity.fingerprint in out
    )
    _, out, _ = run(capsys, monkeypatch, "join", "south", "--remove", *node)
    assert out.startswith("removed south (Süd Klinik)")


def test_help_explains_each_argument_and_the_version_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, "--version")
    assert code == 0 and out.startswith("fedlora 0.")
    for command, words in (("init", "NAME is"), ("join", "FILE is"), ("base", "NAME is")):
        assert words in CliRunner().invoke(cli.app, [command, "--help"]).stdout


@pytest.mark.parametrize("command", ["serve", "check-data"])
def test_no_model_library_is_let_out(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    code, _, _ = run(capsys, monkeypatch, command, "--node", str(tmp_path / "none"))
    assert code == 2 and os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"


def test_looking_at_a_ledger_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a path that was mistyped, an administrator would read a full budget."""
    north = Institution(tmp_path / "n")
    north.begin(manifest_of())
    north.ledger.close()
    policy = north.folder.policy.read_text()
    place = '[ledger]\npath = "elsewhere/ledger.sqlite"'
    assert "[ledger]" not in policy
    north.set_policy(f"{policy}\n{place}\n")
    code, out, _ = run(capsys, monkeypatch, "ledger", "--node", str(north.root))
    assert code == 0 and "no ledger yet" in out
    assert not (north.root / "elsewhere").exists()
