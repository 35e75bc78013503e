"""Every decoder of what comes from outside: one valid message of each, and how it is read.

`DECODERS` is the registry; `ELSEWHERE` says of each function that reads as a decoder does, and is
not here, why. `test_decoders.py` holds both complete.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.client.node.policy import parse_policy
from fedlora.common.adapter.released import read_released
from fedlora.common.codec.framing import Framed, framed, kind_of, unframed
from fedlora.common.codec.strict import canonical, json_table
from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import config_to_toml
from fedlora.common.data.images import Images
from fedlora.common.data.records import Columns, read_label_lists, read_label_set, read_records
from fedlora.common.data.sounds import Sounds
from fedlora.common.data.tagged import read_tag_set
from fedlora.common.ledger.signed_head import HEAD_TAG, Head, opened_head, signed_head
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.projection import Projection
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.protocol import consent, messages, pieces, stages
from fedlora.common.protocol.vectors import BYTES, vector_from_bytes, vector_to_bytes
from fedlora.common.secagg import keys, shamir, wire
from fedlora.common.secagg.ring import Encoding, Masked
from fedlora.common.trust import enrolment, rotation
from fedlora.common.trust.identity import Identity, PublicIdentity, Signed, seal, unseal
from fedlora.server.release.signed_consents import read_statement, statement_text
from tests.client.institution import POLICY, manifest_of
from tests.common.protocol import test_messages as sample
from tests.common.trust.test_enrolment import INVITATION, KEY, REQUEST, certificate, flower_key
from tests.media import png, wav

Decode = Callable[[bytes], Any]
NEW = Identity.generate()
BYTES32, BYTES64 = bytes(range(32)), bytes(64)


@dataclass(frozen=True)
class Decoder:
    """How `valid` is read, and written again where there is one spelling alone."""

    reads: str  # file and function, or the framed class
    valid: bytes
    decode: Decode
    encode: Callable[[Any], bytes] | None = None  # None: a file in whatever spelling, or a part
    name: str = ""  # where one function reads several things

    def __str__(self) -> str:
        return f"{self.reads} {self.name}".strip()


def text_of(data: bytes) -> str:
    """As a file's reader gives it; bytes that are none stand for letters that UTF-8 can't hold."""
    return data.decode(errors="surrogateescape")


def sealed(identity: Identity, tag: str, valid: str, read: Callable[[str, str], Any]) -> Decode:
    """Whoever has a key may sign what it likes: the body is changed before it is sealed."""

    def decode(body: bytes) -> Any:
        try:
            table = json.loads(body)
        except (ValueError, RecursionError):
            return read(text_of(body), "where")
        try:
            text = seal(identity, tag, table)
        except (ValueError, TypeError, RecursionError, AttributeError):
            return read(json.dumps(table), "where")
        except Exception:  # not a table: nothing can be sealed that is none
            return read(json.dumps(table), "where")
        return read(text, "where")

    return decode


def body_of(text: str) -> bytes:
    """What was signed of a sealed text."""
    return canonical(json.loads(text)["body"])


def framed_ones() -> list[Decoder]:
    """One of each class that is written as a frame."""
    epoch = wire.Epoch("f", "sha256:r", 1, 1, 2)
    offer = wire.KeyOffer(BYTES32, "north", BYTES32, (BYTES32, BYTES32), BYTES64)
    dealer = wire.Dealer("north", BYTES32, bytes(64), BYTES64)
    plan = RoundPlan("sha256:m", 0, 1, 1, "sha256:a")
    values: list[Framed] = [
        *(sample.OFFER, sample.START, sample.TASK, sample.STAGE, sample.PIECE, sample.FETCH),
        stages.Request(stages.Stage.INPUT, "north", plan, b"message", bytes(8)),
        *(epoch, offer, dealer),
        wire.Deal("north", BYTES32, (b"", b"sealed"), bytes(64), bytes(64), BYTES64),
        wire.Delivery((dealer, dealer), (b"", b"sealed"), (bytes(32), bytes(32))),
        wire.MaskedInput("north", BYTES32, BYTES32, bytes(64), BYTES64),
        wire.Confirmation("north", BYTES64),
        wire.Opening("north", bytes(96), BYTES64),
    ]
    return [
        Decoder(
            f"{type(each).__module__}.{type(each).__name__}",
            each.to_bytes(),
            type(each).from_bytes,
            lambda value: bytes(value.to_bytes()),
        )
        for each in values
    ]


def of_secagg() -> list[Decoder]:
    """What its stages exchange beside frames."""
    offers = [each.valid for each in framed_ones() if each.reads.endswith("KeyOffer")] * 2
    confirmed = [wire.Confirmation(name, BYTES64) for name in ("north", "south")]
    encoding = Encoding(4, 32, 1.0, 1 << 10)
    return [
        Decoder(
            "common/secagg/wire.py cohort_from_bytes",
            wire.cohort_to_bytes(offers),
            wire.cohort_from_bytes,
            lambda found: wire.cohort_to_bytes([each.to_bytes() for each in found]),
        ),
        Decoder(
            "common/secagg/wire.py survivors_from_bytes",
            wire.survivors_to_bytes(["north", "south"]),
            wire.survivors_from_bytes,
            wire.survivors_to_bytes,
        ),
        Decoder(
            "common/secagg/wire.py agreement_from_bytes",
            wire.agreement_to_bytes(confirmed),
            wire.agreement_from_bytes,
            wire.agreement_to_bytes,
        ),
        Decoder(
            "common/secagg/keys.py unseal",
            keys.seal(BYTES32, b"share", b"context"),
            lambda data: keys.unseal(BYTES32, data, b"context", "share"),
            lambda found: keys.seal(BYTES32, found, b"context"),
        ),
        Decoder(
            "common/secagg/shamir.py from_bytes",
            shamir.to_bytes(5),
            lambda data: shamir.from_bytes(data, "share"),
            shamir.to_bytes,
        ),
        Decoder(
            "common/secagg/ring.py Masked.from_bytes",
            bytes(encoding.vector_bytes),
            lambda data: Masked.from_bytes(encoding, data, "vector"),
            lambda found: bytes(found.to_bytes()),
        ),
    ]


def of_protocol() -> list[Decoder]:
    """Requests, replies and what is in them."""
    members = {"north": sample.NORTH.public}
    replies = {
        **{"answer": sample.ANSWER, "consent": sample.CONSENT, "decline": sample.DECLINE},
        **{"taken": sample.TAKEN, "parted": sample.PARTED, "part": sample.PART},
    }
    asked = (sample.OFFER, sample.START, sample.TASK, sample.STAGE, sample.PIECE, sample.FETCH)
    read = "common/protocol/messages.py"

    def reply(data: bytes) -> Any:
        return messages.reply_from_bytes(data, "f", members)

    def reply_bytes(found: Any) -> bytes:
        return messages.reply_to_bytes(sample.NORTH, "f", found)

    return [
        *(
            Decoder(
                f"{read} request_from_bytes",
                messages.request_to_bytes(each),
                messages.request_from_bytes,
                messages.request_to_bytes,
                type(each).__name__,
            )
            for each in asked
        ),
        *(
            Decoder(f"{read} reply_from_bytes", reply_bytes(each), reply, reply_bytes, name)
            for name, each in replies.items()
        ),
        *(
            Decoder(
                f"{read} reply_from_bytes", body, signed_reply(kind), None, f"{kind}, signed anew"
            )
            for kind, body in (
                ("consent", b'{"delta":1e-05,"epsilon":1.5,"policy":"sha256:p"}'),
                ("decline", b'{"reason":"no","refused":true}'),
                ("taken", b'{"parts":3}'),
                ("parted", canonical({"digests": ["0" * 64], "part": 8, "size": 5})),
            )
        ),
        Decoder(
            "common/protocol/pieces.py Coming.from_bytes",
            sample.COMING.to_bytes(),
            pieces.Coming.from_bytes,
            lambda found: bytes(found.to_bytes()),
        ),
        Decoder(
            f"{read} Address.from_bytes",
            sample.ADDRESS.to_bytes(),
            messages.Address.from_bytes,
            lambda found: bytes(found.to_bytes()),
        ),
        *(
            Decoder(
                "common/protocol/vectors.py vector_from_bytes",
                vector_to_bytes(np.linspace(-1, 1, 4, dtype=np.float32), wire),
                partial(vector_from_bytes, size=4, where="vector", wire=wire),
                partial(vector_to_bytes, wire=wire),
                wire,
            )
            for wire in BYTES
        ),
        Decoder(
            "common/protocol/consent.py Start.from_bytes",
            sample.BODY.to_bytes(),
            consent.Start.from_bytes,
            lambda found: bytes(found.to_bytes()),
        ),
    ]


def signed_reply(kind: str) -> Decode:
    """A member signs whatever body it likes."""

    def decode(body: bytes) -> Any:
        data = sample.signed_reply(kind, 0, 0, body)
        return messages.reply_from_bytes(data, "f", {"north": sample.NORTH.public})

    return decode


def of_trust() -> list[Decoder]:
    """Keys, signed texts, and who enrols."""
    request = enrolment.request_to_text(KEY, REQUEST)
    invitation = enrolment.invitation_to_text(KEY, INVITATION)
    handed = enrolment.request_to_text(NEW, request_of_new())
    rotated = rotation.rotation_to_text(KEY, handed)
    signed = Signed.by(KEY, "tag", b"{}")
    readers: list[tuple[str, str, str, Callable[[str, str], Any]]] = [
        ("enrolment", "request_from_text", request, enrolment.request_from_text),
        ("enrolment", "invitation_from_text", invitation, enrolment.invitation_from_text),
        ("rotation", "rotation_from_text", rotated, rotation.rotation_from_text),
    ]
    writers: dict[str, Callable[[Any], str]] = {
        "request_from_text": lambda found: enrolment.request_to_text(KEY, found),
        "invitation_from_text": lambda found: enrolment.invitation_to_text(KEY, found),
        "rotation_from_text": lambda found: rotation.rotation_to_text(KEY, found.text),
    }
    tags = {
        "request_from_text": enrolment.KINDS[enrolment.REQUEST][1],
        "invitation_from_text": enrolment.KINDS[enrolment.INVITATION][1],
        "rotation_from_text": rotation.ROTATION_TAG,
    }
    return [
        *(
            Decoder(
                f"common/trust/{file}.py {name}", text.encode(), reader(read), writer(writers[name])
            )
            for file, name, text, read in readers
        ),
        *(
            Decoder(
                f"common/trust/{file}.py {name}",
                body_of(text),
                sealed(KEY, tags[name], text, read),
                None,
                "signed anew",
            )
            for file, name, text, read in readers
        ),
        Decoder(
            "common/trust/rotation.py is_rotation",
            rotated.encode(),
            lambda data: rotation.is_rotation(text_of(data)),
        ),
        Decoder(
            "common/trust/identity.py Signed.from_bytes",
            signed.to_bytes(),
            Signed.from_bytes,
            lambda found: bytes(found.to_bytes()),
        ),
        Decoder(
            "common/trust/identity.py Signed.from_text",
            signed.text.encode(),
            lambda data: Signed.from_text(text_of(data), "where"),
        ),
        Decoder(
            "common/trust/identity.py unseal",
            signed.text.encode(),
            lambda data: unseal(text_of(data), "tag", "where"),
            lambda found: found.text.encode(errors="surrogateescape"),
        ),
        Decoder(
            "common/trust/identity.py PublicIdentity.from_text",
            KEY.public.text.encode(),
            lambda data: PublicIdentity.from_text(text_of(data), "where"),
            lambda found: found.text.encode(),
        ),
        Decoder(
            "common/trust/identity.py Identity.load", private_key(), in_a_file(Identity.load, 0o600)
        ),
        Decoder(
            "common/trust/enrolment.py check_flower_key",
            flower_key().encode(),
            flower_line,
            lambda found: found,
        ),
        Decoder(
            "common/trust/enrolment.py certificate_in",
            certificate().encode(),
            lambda data: enrolment.certificate_in(data, "where"),
        ),
        Decoder(
            "common/trust/enrolment.py certificate_fingerprint",
            certificate().encode(),
            lambda data: enrolment.certificate_fingerprint(text_of(data), "where"),
        ),
    ]


def flower_line(data: bytes) -> bytes:
    """The line itself, once it was checked."""
    enrolment.check_flower_key(text_of(data), "where")
    return data


def reader(read: Callable[[str, str], Any]) -> Decode:
    """Of bytes, as a file of text is read."""
    return lambda data: read(text_of(data), "where")


def writer(write: Callable[[Any], str]) -> Callable[[Any], bytes]:
    """To bytes, as a file of text is written."""
    return lambda found: write(found).encode()


def request_of_new() -> enrolment.EnrolmentRequest:
    """What the key that takes over asks for."""
    return enrolment.EnrolmentRequest(
        "north", "Nord Klinik", NEW.public, flower_key(), "2026-11-23T10:00:00+00:00"
    )


@cache
def scratch() -> Path:
    """A folder for decoders that read files."""
    return Path(tempfile.mkdtemp(prefix="fedlora-decoders-"))


def in_a_file(read: Callable[[Path], Any], mode: int = 0o644, ending: str = "") -> Decode:
    """A decoder of bytes, of one that reads a file."""

    def decode(data: bytes) -> Any:
        path = scratch() / f"file{ending}"
        path.write_bytes(data)
        path.chmod(mode)
        return read(path)

    return decode


@cache
def private_key() -> bytes:
    """A PEM file of an Ed25519 key."""
    path = scratch() / "key.pem"
    NEW.write(path)
    return path.read_bytes()


def of_files() -> list[Decoder]:
    """Manifests, plans, heads, adapters and what an operator writes."""
    spec = AdapterSpec((TensorSpec("a", (2, 2)), TensorSpec("b", (3,))))
    state = AdapterState(spec, np.linspace(-1, 1, 7, dtype=np.float32))
    features = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    projection = scratch() / "projection.safetensors"
    Projection.fit(features, 4, 1.0, 3, 1.0).write(projection)
    run = manifest_of()
    head = Head(3, "sha256:h")
    words = scratch() / "words.jsonl"
    words.write_text('{"text":"a b","label":"x","unit":"p"}\n{"text":"c","label":"y","unit":"q"}\n')
    csv = b'text,label,unit\n"a, b",x,p\nc,y,q\n'
    columns = Columns(text="text", label="label", unit="unit")

    def records(path: Path) -> Any:
        return read_records(path, columns, ("x", "y"))

    def media(path: Path) -> Any:
        return read_records(path, Columns("", media="image", label="label"), ("x", "y"))

    consent = statement_text(sample.CONSENT, b"signed").encode()
    return [
        Decoder(
            "common/manifest/manifest.py RunManifest.from_bytes",
            run.to_bytes(),
            RunManifest.from_bytes,
            lambda found: bytes(found.to_bytes()),
        ),
        Decoder(
            "common/manifest/manifest.py RunManifest.from_json",
            run.to_bytes(),
            RunManifest.from_json,
        ),
        Decoder(
            "common/manifest/plan.py RoundPlan.from_bytes",
            RoundPlan("sha256:m", 0, 1, 1, "sha256:a").to_bytes(),
            RoundPlan.from_bytes,
            lambda found: bytes(found.to_bytes()),
        ),
        Decoder(
            "common/ledger/signed_head.py opened_head",
            signed_head(KEY, head),
            lambda data: opened_head(data, KEY.public),
            lambda found: signed_head(KEY, found),
        ),
        Decoder(
            "common/ledger/signed_head.py opened_head",
            body_of(signed_head(KEY, head).decode()),
            sealed(
                KEY,
                HEAD_TAG,
                "",
                lambda text, _: opened_head(text.encode(errors="replace"), KEY.public),
            ),
            None,
            "signed anew",
        ),
        Decoder(
            "common/model/state.py AdapterState.from_bytes",
            state.to_bytes(),
            lambda data: AdapterState.from_bytes(data, spec),
        ),
        Decoder(
            "common/model/projection.py Projection.from_bytes",
            projection.read_bytes(),
            lambda data: Projection.from_bytes(data, "projection"),
        ),
        Decoder(
            "common/config/load.py parse_config",
            config_to_toml(parse_config("")).encode(),
            lambda data: parse_config(text_of(data)),
        ),
        Decoder(
            "client/node/policy.py parse_policy",
            POLICY.format(base="sha256:" + "0" * 64, folder="base").encode(),
            lambda data: parse_policy(text_of(data)),
        ),
        Decoder(
            "server/release/signed_consents.py read_statement",
            consent,
            lambda data: read_statement(text_of(data), "statement"),
        ),
        Decoder(
            "common/data/records.py read_records",
            words.read_bytes(),
            in_a_file(records, ending=".jsonl"),
            None,
            "JSON lines",
        ),
        Decoder(
            "common/data/records.py read_records",
            csv,
            in_a_file(records, ending=".csv"),
            None,
            "CSV",
        ),
        Decoder(
            "common/data/records.py read_records",
            b'{"image":"words.jsonl","label":"x"}\n{"image":"./words.jsonl","label":"y"}\n',
            in_a_file(media, ending=".jsonl"),
            None,
            "paths of media",
        ),
        Decoder(
            "common/data/images.py decoded",
            png(np.random.default_rng(0)),
            lambda data: Images().decoded(data, "here"),
        ),
        Decoder(
            "common/data/sounds.py decoded",
            wav(np.random.default_rng(0), 440.0, 4000),
            lambda data: Sounds().decoded(data, "here"),
        ),
        Decoder(
            "common/data/records.py read_label_set",
            csv,
            in_a_file(lambda path: read_label_set(path, "label"), ending=".csv"),
        ),
        Decoder(
            "common/data/records.py read_label_lists",
            b'{"labels":["a","b"]}\n{"labels":["b"]}\n',
            in_a_file(lambda path: read_label_lists(path, "labels"), ending=".jsonl"),
        ),
        Decoder(
            "common/data/tagged.py read_tag_set",
            b'{"tags":["O","B-x","I-x"]}\n{"tags":["B-y"]}\n',
            in_a_file(lambda path: read_tag_set(path, "tags"), ending=".jsonl"),
        ),
        Decoder(
            "common/codec/strict.py json_table", b'{"a":[1,2.5,"x"]}', lambda d: json_table(d, "w")
        ),
        Decoder(
            "common/codec/framing.py unframed",
            framed("tag", b"one", b"two"),
            lambda data: unframed(data, "tag"),
            lambda found: framed("tag", *found),
        ),
        Decoder("common/codec/framing.py kind_of", framed("tag", b"x"), lambda d: kind_of(d, "w")),
    ]


def of_a_release(folder: Path) -> list[Decoder]:
    """One for each file of an exported adapter, which is read with all the others as they were."""
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors")
    )
    return [
        Decoder(
            "common/adapter/released.py read_released",
            (folder / name).read_bytes(),
            replaced(folder, name),
            None,
            name,
        )
        for name in names
    ]


def replaced(folder: Path, name: str) -> Decode:
    """The folder with other bytes in one of its files."""
    valid = (folder / name).read_bytes()

    def decode(data: bytes) -> Any:
        (folder / name).write_bytes(data)
        try:
            return read_released(folder)
        finally:
            (folder / name).write_bytes(valid)

    return decode


@cache
def decoders() -> tuple[Decoder, ...]:
    """All but those of a release, which need one."""
    return (*framed_ones(), *of_secagg(), *of_protocol(), *of_trust(), *of_files())


# Functions that are named as decoders are, and what bears them instead.
ELSEWHERE = {
    "common/codec/framing.py Framed.from_bytes": "each of its classes is here",
    "common/codec/framing.py unframe": "each of its classes is here",
    "common/codec/strict.py from_canonical": "whoever calls it is here",
    "common/protocol/flower.py read_envelope": "a record of Flower: common/protocol/test_flower.py",
    "common/protocol/stages.py Request.from_bytes": "here as a class",
    "common/config/load.py load_config": "parse_config of a file",
    "common/config/toml.py read_table": "parse_config",
    "common/config/toml.py read_fields": "parse_config",
    "common/model/state.py AdapterState.from_named": "from_bytes",
    "common/adapter/released.py read_state": "read_released",
    "common/adapter/released.py read_description": "read_released",
    "common/adapter/released.py read_projection": "read_released",
    "common/adapter/released.py read_spec": "read_released",
    "common/trust/identity.py Signed.opened": "a signature; the body's decoder is here",
    "common/trust/identity.py read_private": "Identity.load",
    "common/disk/files.py read_bytes": "bytes as they are: common/disk/test_bounded.py",
    "common/disk/files.py read_text": "UTF-8: common/disk/test_bounded.py",
    "common/data/database.py read_database": "SQLite's own reader: common/data/test_database.py",
    "common/disk/guarded.py read_guarded": "bytes as they are: attacks/test_stale_policy.py",
}
