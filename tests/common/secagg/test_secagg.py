"""The arithmetic of secure aggregation: algebra, known answers, and bytes that have one meaning."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.client.node.outbox import MemoryOutbox
from fedlora.client.secagg.node import SecureNode
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.protocol.stages import Request, Stage
from fedlora.common.secagg import cohort, commit, keys, masks, shamir, wire
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.secagg.ring import Encoding, Masked, key_stream, linear_check
from fedlora.common.trust.enrolment import Peer
from fedlora.common.trust.identity import Identity
from fedlora.server.secagg.attempt import ServerAttempt
from fedlora.server.secagg.epoch import ServerEpoch
from tests import oracles

VECTORS = Path(__file__).parent / "fixtures" / "secagg.json"
CASES: list[dict[str, Any]] = json.loads(VECTORS.read_text()) if VECTORS.exists() else []
ENCODINGS = st.sampled_from([32, 64])
KEYS = st.binary(min_size=32, max_size=32)

# --- known answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_reference_gives_the_known_answers(case: dict[str, Any]) -> None:
    assert oracles.secure_round(case["given"]) == case["expected"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_product_gives_the_known_answers(case: dict[str, Any]) -> None:
    assert played(case["given"]) == case["expected"]


def test_there_are_known_answers() -> None:
    assert {case["given"]["bits"] for case in CASES} == {32, 64}
    assert {len(case["given"]["names"]) for case in CASES} >= {3, 5}


def played(case: dict[str, Any]) -> dict[str, Any]:
    """The same round by the product's state machines."""
    names = case["names"]
    encoding = Encoding(len(case["values"][0]), case["bits"], 1.0, 1 << 20)
    known = {}
    for name in names:
        identity = identity_of(name)
        known[name] = Peer(name, f"of {name}", identity.public)
    nodes = {
        name: SecureNode(
            identity_of(name),
            CohortPolicy(name, known, 3, 1),
            case["federation"],
            case["run"],
            MemoryOutbox(),
            draw=oracles.CountedDraws(name),
        )
        for name in names
    }
    epoch = wire.Epoch(case["federation"], case["run"], 1, 1, 1)
    server = ServerEpoch(epoch, {name: peer.identity for name, peer in known.items()}, 3)
    for node in nodes.values():
        server.add_offer(node.offer(epoch))
    members = server.close_offers()
    deals = {name: node.deal(members) for name, node in nodes.items()}
    for deal in deals.values():
        server.add_deal(deal)
    listed = server.close_deals()
    slot = wire.Slot(1, 1, case["adapter"], case["base"])
    attempt, vectors = ServerAttempt(listed, slot, encoding), {}
    for name, values in zip(names, case["values"], strict=True):
        nodes[name].accept(server.delivery(name))
        message = nodes[name].mask(slot, encoding, np.array(values, dtype=np.int64))
        vectors[name] = bytes(wire.MaskedInput.from_bytes(message).vector).hex()
        attempt.add_input(message)
    survivors = attempt.close_inputs()
    for node in nodes.values():
        attempt.add_confirmation(node.confirm(1, survivors))
    agreement = attempt.agreement()
    for node in nodes.values():
        attempt.add_opening(node.open(1, agreement))
    context = slot.context(epoch)
    return {
        "context": context.hex(),
        "cohort": listed.cohort.hex(),
        "dealers": listed.dealers.hex(),
        "survivors": cohort.survivors_digest(context, listed.dealers, names).hex(),
        "sealed": {
            f"{name} to {other}": wire.Deal.from_bytes(deals[name]).sealed[place].hex()
            for name in names
            for place, other in enumerate(names)
            if other != name
        },
        "vectors": vectors,
        "sum": attempt.result().levels.tolist(),
    }


def identity_of(name: str) -> Identity:
    return Identity(
        Ed25519PrivateKey.from_private_bytes(oracles.CountedDraws("identity of " + name)(32))
    )


def write_known_answers() -> None:
    """By the reference alone.

    `python -c "from tests.common.secagg.test_secagg import *; write_known_answers()"`
    """
    rng = np.random.default_rng(4)
    written = []
    for names, size, bits in (
        (["a", "b", "c"], 5, 32),
        (["bank", "clinic", "hospital", "university", "ärzte"], 7, 64),
    ):
        values = rng.integers(-(1 << 20), (1 << 20) + 1, (len(names), size))
        values[:, 0], values[:, 1] = 1 << 20, -(1 << 20)
        given = {
            "federation": "known answers",
            "run": "sha256:" + "01" * 32,
            "adapter": "sha256:" + "02" * 32,
            "base": "sha256:" + "03" * 32,
            "names": names,
            "identities": [identity_of(name).public.key.hex() for name in names],
            "bits": bits,
            "values": values.tolist(),
        }
        expected = oracles.secure_round(given)
        written.append(
            {"id": f"{len(names)}-nodes-{bits}-bits", "given": given, "expected": expected}
        )
    VECTORS.parent.mkdir(exist_ok=True)
    VECTORS.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")


# --- the reference itself, by the standards' own vectors ------------------------------------------


def test_the_reference_primitives() -> None:
    """FIPS 197 C.3, RFC 7748 6.1, RFC 5869 test case 1 (first block)."""
    key = bytes(range(32))
    assert (
        oracles.aes256(key, bytes.fromhex("00112233445566778899aabbccddeeff")).hex()
        == "8ea2b7ca516745bfeafc49904b496089"
    )
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    assert (
        oracles.x25519(alice).hex()
        == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    )
    secret, salt = b"\x0b" * 22, bytes(range(13))
    assert (
        oracles.hkdf_sha256(secret, salt, bytes(range(0xF0, 0xFA))).hex()
        == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    )


@given(KEYS, st.binary(max_size=100), st.binary(max_size=40))
@settings(max_examples=15, deadline=None)
def test_primitives_equal_the_reference(key: bytes, text: bytes, bound_to: bytes) -> None:
    assert keys.hkdf(key, text, bound_to) == oracles.hkdf_sha256(key, text, bound_to)
    library = HKDF(SHA256(), 32, text, bound_to).derive(key)
    assert keys.hkdf(key, text, bound_to) == library
    assert keys.seal(key, text, bound_to) == oracles.chacha20_poly1305(key, text, bound_to)
    assert key_stream(key).update(bytes(40)) == oracles.aes_ctr(key, 40)
    assert keys.KeyPair(key).public == oracles.x25519(key)


# --- Shamir ---------------------------------------------------------------------------------------


@given(st.data(), st.integers(0, shamir.P - 1), st.integers(1, 12))
@settings(max_examples=60)
def test_any_t_shares_give_the_secret(data: st.DataObject, secret: int, holders: int) -> None:
    t = data.draw(st.integers(1, holders))
    shares = shamir.split(secret, t, holders, os.urandom)
    places = data.draw(st.permutations(range(1, holders + 1)))[:t]
    weights = shamir.weights_at_zero(places)
    assert shamir.combine(weights, [shares[place - 1] for place in places]) == secret


def test_t_minus_1_shares_say_nothing() -> None:
    """For t - 1 shares and any secret there is exactly one polynomial: none is ruled out."""
    shares = shamir.split(12345, 3, 5, os.urandom)
    for secret in (0, 1, 99999, shamir.P - 1):
        weights = shamir.weights_at_zero([1, 2, 5])
        fifth = (secret - weights[0] * shares[0] - weights[1] * shares[1]) * pow(
            weights[2], -1, shamir.P
        )
        assert shamir.combine(weights, [shares[0], shares[1], fifth % shamir.P]) == secret
    many = [shamir.split(1, 2, 2, os.urandom)[0] for _ in range(200)]
    assert len(set(many)) == 200
    assert 0.3 < sum(share > shamir.P // 2 for share in many) / 200 < 0.7


def test_shamir_refuses_nonsense() -> None:
    for threshold, holders in ((0, 3), (4, 3)):
        with pytest.raises(BadInput, match="threshold"):
            shamir.split(1, threshold, holders, os.urandom)
    with pytest.raises(BadInput, match="outside the field"):
        shamir.split(shamir.P, 2, 3, os.urandom)
    for places in ([], [1, 1], [0, 1]):
        with pytest.raises(BadInput, match="distinct numbers"):
            shamir.weights_at_zero(places)
    for data in (bytes(31), bytes(33), b"\xff" * 32):
        with pytest.raises(BadInput, match="no field element"):
            shamir.from_bytes(data, "share")
    draws = iter([b"\xff" * 32, shamir.to_bytes(7)])
    assert shamir.below_p(lambda size: next(draws)) == 7


# --- the ring -------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 6), ENCODINGS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_masks_cancel_and_sums_are_exact(size: int, members: int, bits: int, random: Any) -> None:
    encoding = Encoding(size, bits, 1.0, 1 << 20)
    check, total = random.randbytes(32), Masked.zeros(encoding)
    inputs = [
        np.array([random.randint(-(1 << 20), 1 << 20) for _ in range(size)], dtype=np.int64)
        for _ in range(members)
    ]
    pairs = {(i, j): random.randbytes(32) for i in range(members) for j in range(i)}
    for i, values in enumerate(inputs):
        masked = Masked.of(encoding, values, check)
        for (high, low), key in pairs.items():
            if i in (high, low):
                masked.apply_mask(key, positive=i == low)
        sent = masked.to_bytes()
        assert len(sent) == encoding.vector_bytes
        total.add(Masked.from_bytes(encoding, sent, "input"))
    assert (total.check(members, check) == np.sum(inputs, axis=0)).all()


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20))
def test_encoding_saturates_and_rounds_to_the_nearest(values: list[float]) -> None:
    encoding = Encoding(len(values), 32, 2.0, 1 << 20)
    levels = encoding.encode(np.array(values, dtype=np.float32))
    expected = [min(max(round(value * (1 << 20) / 2.0), -(1 << 20)), 1 << 20) for value in values]
    assert np.abs(levels - expected).max() <= 0
    assert (
        np.abs(encoding.decode(levels) - np.clip(values, -2, 2)).max()
        <= 2.0 / (1 << 20) / 2 * 1.0001
    )


def test_a_wrapped_damaged_doubled_or_lost_input_is_found() -> None:
    encoding, check = Encoding(4, 32, 1.0, 1 << 20), b"k" * 32
    one = Masked.of(encoding, np.array([5, -5, 0, 1 << 20], dtype=np.int64), check)
    total = Masked.zeros(encoding)
    for _ in range(3):
        total.add(one)
    assert total.check(3, check).tolist() == [15, -15, 0, 3 << 20]
    for members in (2, 4):
        with pytest.raises(BadInput, match="count"):
            total.check(members, check)
    with pytest.raises(BadInput, match="linear check"):
        total.check(3, b"x" * 32)
    for place, change in ((0, 1), (1, 1 << 31), (3, 1 << 16)):
        total.body[place] ^= np.uint32(change)
        with pytest.raises(BadInput, match="linear check"):
            total.check(3, check)
        total.body[place] ^= np.uint32(change)
    beyond = Masked.of(encoding, np.array([0, 0, 0, (1 << 20) + 1], dtype=np.int64), check)
    with pytest.raises(BadInput, match="expected at most 1 times"):
        beyond.check(1, check)


def test_range_checks_at_the_start() -> None:
    """n · levels + 10σ√n below half the ring: 32 bits, else 64, else refused."""
    assert Encoding.fitting(4, 1.0, 1 << 22, 511).bits == 32
    assert Encoding.fitting(4, 1.0, 1 << 22, 512).bits == 64
    assert Encoding.fitting(4, 1.0, 1 << 22, 500, noise=1e6).bits == 64
    assert Encoding.fitting(4, 1.0, 1 << 52, 2047).bits == 64
    with pytest.raises(BadInput, match="do not fit half of 2\\^64"):
        Encoding.fitting(4, 1.0, 1 << 52, 2048)
    with pytest.raises(BadInput, match="do not fit half of 2\\^32"):
        Encoding(4, 32, 1.0, 1 << 30).check(2)
    for changes in (
        {"size": 0},
        {"bits": 16},
        {"bound": float("nan")},
        {"bound": 0.0},
        {"levels": 0},
    ):
        with pytest.raises(
            BadInput, match=f"{next(iter(changes)).replace('bound', 'update_bound')}: found"
        ):
            Encoding(**{"size": 4, "bits": 32, "bound": 1.0, "levels": 8, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [np.zeros(3), np.full(4, np.nan), np.array([0, 1, 2, np.inf])])
def test_vec_short_and_values_that_are_no_numbers(values: np.ndarray[Any, Any]) -> None:
    with pytest.raises(BadInput):
        Encoding(4, 32, 1.0, 8).encode(values)


def test_long_vectors_go_through_in_parts() -> None:
    """Beyond one chunk of key stream, and with a remainder."""
    for bits in (32, 64):
        encoding = Encoding(70_001, bits, 1.0, 1 << 20)
        masked = Masked.zeros(encoding)
        masked.apply_mask(b"k" * 32, positive=True)
        assert masked.to_bytes() == key_stream(b"k" * 32).update(bytes(encoding.vector_bytes))
    values = np.arange(-40_000, 30_001, dtype=np.int64)
    weights = np.frombuffer(key_stream(b"k" * 32).update(bytes(8 * 70_001)), "<u8")
    expected = sum(int(w) * int(v) for w, v in zip(weights, values, strict=True)) % (1 << 64)
    assert linear_check(b"k" * 32, values) == expected


# --- Merkle ---------------------------------------------------------------------------------------


@given(st.lists(KEYS, min_size=1, max_size=13), st.data())
@settings(max_examples=60)
def test_a_path_proves_its_leaf_only(leaves: list[bytes], data: st.DataObject) -> None:
    tree = commit.MerkleTree(leaves)
    assert tree.root == oracles.merkle_root_of(leaves)
    for index, leaf in enumerate(leaves):
        commit.check_path(tree.root, leaf, index, len(leaves), tree.path(index), "leaf")
    index = data.draw(st.integers(0, len(leaves) - 1))
    path = tree.path(index)
    wrong = [(bytes(32), path), (leaves[index], path + bytes(32)), (leaves[index], path + b"x")]
    if path:
        wrong += [(leaves[index], path[32:]), (leaves[index], bytes(32) + path[32:])]
    for leaf, attempt in wrong:
        if leaf != leaves[index] or attempt != path:
            with pytest.raises((Refused, BadInput)):
                commit.check_path(tree.root, leaf, index, len(leaves), attempt, "leaf")


# --- bytes ----------------------------------------------------------------------------------------

NAMES = st.text(min_size=1, max_size=8)
DIGESTS, SIGNATURES = st.binary(min_size=32, max_size=32), st.binary(min_size=64, max_size=64)
MESSAGES = st.one_of(
    st.builds(
        wire.KeyOffer, DIGESTS, NAMES, DIGESTS, st.lists(DIGESTS, max_size=3).map(tuple), SIGNATURES
    ),
    st.builds(
        wire.Deal,
        NAMES,
        DIGESTS,
        st.lists(st.binary(max_size=9), max_size=3).map(tuple),
        st.binary(),
        DIGESTS,
        SIGNATURES,
    ),
    st.builds(wire.Confirmation, NAMES, SIGNATURES),
    st.builds(wire.Opening, NAMES, st.binary(), SIGNATURES),
    st.builds(wire.Dealer, NAMES, DIGESTS, st.binary(), SIGNATURES),
    st.builds(
        lambda dealers: wire.Delivery(
            tuple(dealers), tuple(b"s" for _ in dealers), tuple(b"p" for _ in dealers)
        ),
        st.lists(st.builds(wire.Dealer, NAMES, DIGESTS, st.binary(), SIGNATURES), max_size=2),
    ),
    st.builds(
        wire.Epoch, NAMES, NAMES, st.integers(1, 1 << 63), st.integers(1, 9), st.integers(1, 256)
    ),
    st.builds(
        Request,
        st.sampled_from([each for each in Stage if each is not Stage.INPUT]),
        NAMES,
        st.builds(RoundPlan, NAMES, st.integers(0, 9), st.integers(0, 1 << 62), st.just(1), NAMES),
        st.binary(),
    ),
)


@given(MESSAGES, st.data())
@settings(max_examples=150)
def test_a_message_that_is_accepted_has_these_bytes(message: Any, data: st.DataObject) -> None:
    changed = bytearray(message.to_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = type(message).from_bytes(bytes(changed))
    except BadInput:
        return
    assert found.to_bytes() == changed


@given(NAMES, DIGESTS, DIGESTS, st.binary(), SIGNATURES)
def test_a_masked_input_has_one_encoding(
    name: str, context: bytes, dealers: bytes, vector: bytes, signature: bytes
) -> None:
    sent = wire.MaskedInput(name, context, dealers, memoryview(vector), signature).to_bytes()
    found = wire.MaskedInput.from_bytes(sent)
    assert found.to_bytes() == sent and found.vector == vector and found.name == name


@given(MESSAGES, st.data())
@settings(max_examples=150)
def test_messages_have_one_encoding(message: Any, data: st.DataObject) -> None:
    """What is read is what was written.

    Cut, longer or relabelled bytes are refused, nothing else is raised.
    """
    sent = message.to_bytes()
    assert type(message).from_bytes(sent) == message
    cut = data.draw(st.integers(0, len(sent) - 1))
    for damaged in (sent[:cut], sent + b"\0", sent + sent, sent[:8] + b"X" + sent[9:]):
        with pytest.raises(BadInput):
            type(message).from_bytes(damaged)


@given(st.binary(max_size=200))
def test_noise_is_never_a_message(data: bytes) -> None:
    for read in (
        wire.KeyOffer.from_bytes,
        wire.Deal.from_bytes,
        wire.Delivery.from_bytes,
        wire.MaskedInput.from_bytes,
        wire.Confirmation.from_bytes,
        wire.Opening.from_bytes,
        wire.cohort_from_bytes,
        wire.survivors_from_bytes,
        wire.agreement_from_bytes,
    ):
        with pytest.raises(FedloraError):
            read(data)


def test_requests_travel_whole() -> None:
    """What a carrier takes to a node reads back to the same.

    Anything else is refused before it is looked at.
    """
    plan = RoundPlan("sha256:m", 0, 3, 4, "sha256:a")
    for request in (
        Request("confirm", "bank", plan, b"message"),
        Request("input", "ärzte", plan, b"", b"\0" * 16),
        Request("input", "bank", plan, b""),  # whose adapter came in parts
    ):
        assert Request.from_bytes(request.to_bytes()) == request
    for bad in (
        Request("unmask", "bank", plan, b""),
        Request("open", "bank", plan, b"", b"\0" * 4),
        Request("open", "", plan, b""),
    ):
        with pytest.raises(BadInput):
            Request.from_bytes(bad.to_bytes())
    epoch = wire.Epoch("föderation", "sha256:r", 9, 4, 2)
    assert wire.Epoch.from_bytes(epoch.to_bytes()) == epoch
    for damaged in (epoch.to_bytes()[:-1], epoch.to_bytes()[:-8] + bytes(8), b""):
        with pytest.raises(BadInput):
            wire.Epoch.from_bytes(damaged)


def test_an_epoch_has_attempts() -> None:
    assert list(wire.Epoch("f", "r", 1, 4, 3).attempts) == [4, 5, 6]
    for numbers in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 257), (True, 1, 1)):
        with pytest.raises(BadInput, match="epoch"):
            wire.Epoch("f", "r", *numbers)
    assert masks.check_key(bytes(32)) != masks.check_key(b"x" * 32)


@pytest.mark.parametrize(
    ("members", "t", "drops", "colluders"),
    [(3, 3, 0, 1), (5, 4, 1, 2), (10, 7, 3, 3), (20, 14, 6, 7), (100, 67, 33, 33)],
)
def test_what_it_bears(members: int, t: int, drops: int, colluders: int) -> None:
    """The table of docs/secure-aggregation.md."""
    assert cohort.threshold(members) == t
    assert cohort.borne(members) == drops
    assert cohort.most_colluders(members) == colluders
    cohort.check_colluders(members, colluders)
    with pytest.raises(Refused):
        cohort.check_colluders(members, colluders + 1)
    assert cohort.borne(5, minimum=5) == 0


@pytest.mark.parametrize("members", range(3, 201))
def test_two_quorums_share_an_honest_node(members: int) -> None:
    """By counting: two sets of t out of n share at least 2t - n members, more than c."""
    colluders = cohort.most_colluders(members)
    t = cohort.threshold(members)
    assert colluders >= 1 and 2 * t - members > colluders and t - colluders >= 2 and t <= members
