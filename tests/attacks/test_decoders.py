"""Whatever is changed of a message, its decoder gives it back byte for byte, or refuses in a line.

Nothing but the project's own errors leaves a decoder: anything else is a traceback, at a node or at
the coordinator, that a stranger can cause. Before: three kinds of other errors did.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.common.adapter.peft import export_adapter
from fedlora.common.codec.framing import Framed
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import FedloraError
from fedlora.common.model.network import build_model
from fedlora.common.tasks.classification import SequenceClassification
from tests.attacks.decoders import ELSEWHERE, Decoder, decoders, of_a_release
from tests.test_house import ROOT, sources

FAST, LONG = 300, 100_000
READS = ("from_bytes", "from_text", "from_json", "from_canonical", "from_named", "unseal")
BEGIN = ("read_", "opened", "parse_", "unframe", "load_config")
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 62, 1 << 64, 1 << 4000, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x" * 5000, "\ud800", "\x00", "a\nb", "\u202e", "../x", [], [[]], {}, {"": 0}, [None]),
)
PIECES = (
    b"",
    b"\x00",
    b"\xff" * 8,
    b'"',
    b"}",
    b"[" * 2000,
    b"\xed\xa0\x80",
    b"\n",
    b" ",
    b"1e999",
)


def mutated(valid: bytes, rng: random.Random) -> bytes:
    """Changed by bytes, or, where it is JSON, by values."""
    if valid[:1] == b"{" and rng.random() < 0.4:
        changed = with_another_value(valid, rng)
        if changed is not None:
            return changed
    data = bytearray(valid)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : min(end, at + 16)]
            case 2:
                data[at:at] = rng.choice(PIECES)
            case 3:
                data[at:at] = data[at : min(end, at + 64)]
            case 4:
                del data[at:]
            case _ if data:
                data[min(at, len(data) - 1)] = rng.randrange(256)
    return bytes(data)


def with_another_value(valid: bytes, rng: random.Random) -> bytes | None:
    """The table with a value, a key or an order that it did not have, in whatever spelling."""
    try:
        table = json.loads(valid)
    except ValueError:
        return None
    place, keys = table, list(table)
    while isinstance(place, dict | list) and keys:
        key = rng.choice(keys)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            place, keys = inner, list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            continue
        match rng.randrange(4):
            case 0 if isinstance(place, dict):
                place[rng.choice(("", "x", "body", "\ud800"))] = rng.choice(HOSTILE)
            case 1:
                del place[key]
            case _:
                place[key] = rng.choice(HOSTILE)
        break
    ascii_, indent = rng.random() < 0.5, rng.choice((None, 1))
    return json.dumps(table, ensure_ascii=ascii_, indent=indent).encode(errors="surrogatepass")


def attack(decoder: Decoder, times: int, seed: int = 0) -> int:
    """How many changed messages were accepted, each the only spelling of what was read."""
    rng, accepted = random.Random(seed), 0
    for _ in range(times):
        data = mutated(decoder.valid, rng)
        try:
            found = decoder.decode(data)
        except FedloraError as error:
            assert str(error), f"{decoder}: an empty reason for {data!r}"
            continue
        except Exception as error:
            pytest.fail(f"{decoder}: {type(error).__name__} ({error}) for {data[:2000]!r}")
        accepted += 1
        if decoder.encode is not None:
            assert decoder.encode(found) == data, f"{decoder}: accepted {data[:2000]!r}"
    return accepted


@pytest.fixture(scope="module")
def released(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a head of its own, as it is released."""
    settings, lora = (
        ModelConfig(base=str(tiny_bert), pooling="mean"),
        LoraConfig(rank=2, targets=("query",)),
    )
    model = build_model(settings, lora, SequenceClassification(("a", "b")), seed=7)
    folder = tmp_path_factory.mktemp("released") / "adapter"
    export_adapter(model, model.state(), settings, lora, 7, folder)
    return folder


@pytest.mark.parametrize("decoder", decoders(), ids=str)
def test_a_changed_message_is_refused_or_is_another(decoder: Decoder) -> None:
    found = decoder.decode(decoder.valid)
    assert decoder.encode is None or decoder.encode(found) == decoder.valid
    attack(decoder, FAST)


def test_a_changed_file_of_a_release_is_refused(released: Path) -> None:
    for decoder in of_a_release(released):
        decoder.decode(decoder.valid)
        attack(decoder, FAST // 3)


@pytest.mark.attacks
@pytest.mark.parametrize("decoder", decoders(), ids=str)
def test_each_decoder_a_hundred_thousand_times(decoder: Decoder) -> None:
    attack(decoder, LONG, seed=1)


@pytest.mark.attacks
def test_each_file_of_a_release_a_hundred_thousand_times(released: Path) -> None:
    for decoder in of_a_release(released):
        attack(decoder, LONG, seed=1)


def test_the_registry_is_complete() -> None:
    named = {each.reads for each in decoders()} | {"common/adapter/released.py read_released"}
    found = set(reading())
    assert found - named == set(ELSEWHERE), "a decoder that nobody attacks, or a name of none"
    assert not named & set(ELSEWHERE)


def test_each_framed_class_is_attacked() -> None:
    named = {each.reads for each in decoders()}
    classes = {f"{each.__module__}.{each.__name__}" for each in Framed.__subclasses__()}
    ours = {each for each in classes if each.startswith("fedlora.")}
    assert ours and ours <= named


def reading() -> Iterator[str]:
    """Functions of `common` that are named as decoders are, apart from models and their folders."""
    for path in sources("common"):
        place = path.relative_to(ROOT)
        for node in ast.parse(path.read_text()).body:
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for each in inside:
                if isinstance(each, ast.FunctionDef) and is_decoder(each.name):
                    yield f"{place} {owner}{each.name}"


def is_decoder(name: str) -> bool:
    return name.endswith(READS) or name.startswith(BEGIN)
