"""Slow references that the fast paths are proven equal to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedlora.client.training.local import ClientData
from fedlora.client.training.step import ClipGroups
from fedlora.common.data.records import UnitIndex
from fedlora.common.manifest.counts import EDGES, Cells
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Encoded

Dense = npt.NDArray[np.float64]

# --- clipping: one record at a time, one unit at a time, plain autograd, float64 sums -------------


def clipped_sum_by_ones(
    model: AdapterModel,
    data: Encoded,
    units: UnitIndex,
    drawn: npt.NDArray[np.int64],
    groups: ClipGroups,
) -> npt.NDArray[np.float64]:
    """Σ over the drawn units of the unit's whole gradient, clipped by group."""
    total = np.zeros(model.spec.size, dtype=np.float64)
    for unit in drawn:
        gradient = np.zeros(model.spec.size, dtype=np.float64)
        for row in units.records[units.offsets[unit] : units.offsets[unit + 1]]:
            gradient += _gradient_of_one(model, data, row)
        for group, bound in enumerate(groups.bounds):
            inside = groups.group == group
            norm = float(np.linalg.norm(gradient[inside]))
            total[inside] += gradient[inside] * min(1.0, bound / norm if norm else 1.0)
    return total


def _gradient_of_one(model: AdapterModel, data: Encoded, row: int) -> npt.NDArray[np.float64]:
    batch = data.batch(np.array([row]), model.pad, model.device)
    parameters = list(model.parameters.values())
    loss = model.task.losses(model.logits(batch), batch).sum()
    gradients = torch.autograd.grad(loss, parameters)
    return np.concatenate([g.double().numpy().ravel() for g in gradients])


def head_clipped_sum_by_ones(
    head: torch.nn.Module,
    losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    targets: torch.Tensor,
    owners: npt.NDArray[np.int64],
    bound: float,
) -> npt.NDArray[np.float64]:
    """The same for a head alone."""
    parameters = list(head.parameters())
    total = np.zeros(sum(p.numel() for p in parameters), dtype=np.float64)
    for owner in np.unique(owners):
        rows = torch.from_numpy(np.flatnonzero(owners == owner))
        loss = losses(head(features[rows]), targets[rows]).sum()
        flat = np.concatenate(
            [g.double().numpy().ravel() for g in torch.autograd.grad(loss, parameters)]
        )
        norm = float(np.linalg.norm(flat))
        total += flat * min(1.0, bound / norm if norm else 1.0)
    return total


# --- server optimisers: every coordinate by itself, from the whole history, as the paper writes
# them --------


def server_states(
    name: str,
    rates: list[float],
    beta1: float,
    beta2: float,
    start: list[float],
    means: list[list[float]],
) -> list[list[float]]:
    """States by Algorithm 2 of Reddi et al. 2021 (and FedAvgM), a rate for each round.

    Computed in float64; what is remembered from one round to the next is rounded to float32.
    """
    tau = 1e-3
    states = []
    x, m, v = list(start), [0.0] * len(start), [tau**2] * len(start)
    for rate, delta in zip(rates, means, strict=True):
        for i in range(len(x)):
            square = delta[i] ** 2
            if name == "none":
                x[i] += rate * delta[i]
            elif name == "momentum":
                m[i] = beta1 * m[i] + delta[i]
                x[i] += rate * m[i]
            else:
                m[i] = beta1 * m[i] + (1 - beta1) * delta[i]
                if name == "adam":
                    v[i] = beta2 * v[i] + (1 - beta2) * square
                else:
                    v[i] -= (1 - beta2) * square * ((v[i] > square) - (v[i] < square))
                x[i] += rate * m[i] / (v[i] ** 0.5 + tau)
        x, m, v = ([float(np.float32(value)) for value in vector] for vector in (x, m, v))
        states.append(list(x))
    return states


# --- means of products B·A: every one written out, as (out, in) matrices in float64 ---------------


def mean_of_dense_products(factors: list[tuple[Dense, Dense]]) -> Dense:
    """mean(Bᵢ Aᵢ) of pairs (A, B): what an exact rule gives."""
    total = sum((b @ a for a, b in factors), np.zeros((len(factors[0][1]), len(factors[0][0].T))))
    return np.asarray(total / len(factors))


def product_of_means(factors: list[tuple[Dense, Dense]]) -> Dense:
    """mean(B) mean(A): FedAvg's."""
    a, b = (np.mean([pair[k] for pair in factors], axis=0) for k in (0, 1))
    return np.asarray(b @ a)


def cut_to_rank(matrix: Dense, rank: int) -> Dense:
    """The nearest of that rank (FlexLoRA's of the mean), by a whole SVD."""
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * values[:rank]) @ v[:rank])


def with_residual(factors: list[tuple[Dense, Dense]]) -> tuple[Dense, Dense]:
    """FedEx-LoRA (Singhal et al. 2024): the product of the means, and what a base has to take."""
    product = product_of_means(factors)
    return product, np.mean([b @ a for a, b in factors], axis=0) - product


def stacked(factors: list[tuple[Dense, Dense]]) -> tuple[Dense, Dense]:
    """FLoRA (Wang et al. 2024): A and B of rank n·r, whose product is the mean."""
    return (np.vstack([a for a, _ in factors]), np.hstack([b / len(factors) for _, b in factors]))


# --- secure aggregation: whole numbers and hashlib only; nothing of the implementation, nothing of
# `cryptography` ---

P256, P25519 = 2**256 - 189, 2**255 - 19


def framed_bytes(*parts: bytes) -> bytes:
    """Tag and fields, each behind 8 bytes of length."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def framed_hash(tag: str, *parts: bytes) -> bytes:
    return hashlib.sha256(framed_bytes(tag.encode(), *parts)).digest()


def x25519(scalar: bytes, point: bytes = b"\x09" + bytes(31)) -> bytes:
    """RFC 7748, section 5: the Montgomery ladder."""
    k = int.from_bytes(scalar, "little") & ~7 & (1 << 255) - 1 | 1 << 254
    u, p = int.from_bytes(point, "little") & (1 << 255) - 1, P25519
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, aa, bb = d * a, c * b, a * a, b * b
        x3, z3 = (da + cb) ** 2 % p, u * (da - cb) ** 2 % p
        x2, z2 = aa * bb % p, (aa - bb) * (aa + 121665 * (aa - bb)) % p
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


def hkdf_sha256(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with HMAC written out (RFC 2104), 32 bytes."""

    def mac(key: bytes, text: bytes) -> bytes:
        key = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
        inner = hashlib.sha256(bytes(k ^ 0x36 for k in key) + text).digest()
        return hashlib.sha256(bytes(k ^ 0x5C for k in key) + inner).digest()

    return mac(mac(salt, secret), info + b"\x01")


def _times(a: int, b: int) -> int:
    """A product in GF(2^8) of AES."""
    result = 0
    while b:
        result ^= a if b & 1 else 0
        a, b = (a << 1) ^ (0x11B if a & 0x80 else 0), b >> 1
    return result


def _sbox() -> list[int]:
    inverse = [0] + [next(b for b in range(256) if _times(a, b) == 1) for a in range(1, 256)]
    turned = [[(x << n | x >> (8 - n)) & 255 for n in range(5)] for x in inverse]
    return [a ^ b ^ c ^ d ^ e ^ 0x63 for a, b, c, d, e in turned]


SBOX = _sbox()


def aes256(key: bytes, block: bytes) -> bytes:
    """FIPS 197, one block."""
    words, constant = [list(key[i : i + 4]) for i in range(0, 32, 4)], 1
    for i in range(8, 60):
        word = list(words[-1])
        if i % 8 == 0:
            word = [SBOX[b] for b in word[1:] + word[:1]]
            word[0] ^= constant
            constant = _times(constant, 2)
        elif i % 8 == 4:
            word = [SBOX[b] for b in word]
        words.append([a ^ b for a, b in zip(word, words[-8], strict=True)])
    keys = [[byte for word in words[4 * r : 4 * r + 4] for byte in word] for r in range(15)]
    state = [a ^ b for a, b in zip(block, keys[0], strict=True)]
    for number in range(1, 15):
        state = [SBOX[state[(i + 4 * (i % 4)) % 16]] for i in range(16)]
        if number < 14:
            mixed = []
            for c in range(0, 16, 4):
                s = state[c : c + 4]
                for r in range(4):
                    mixed.append(
                        _times(s[r], 2)
                        ^ _times(s[(r + 1) % 4], 3)
                        ^ s[(r + 2) % 4]
                        ^ s[(r + 3) % 4]
                    )
            state = mixed
        state = [a ^ b for a, b in zip(state, keys[number], strict=True)]
    return bytes(state)


def aes_ctr(key: bytes, length: int) -> bytes:
    """The key stream from counter 0."""
    blocks = (aes256(key, counter.to_bytes(16, "big")) for counter in range((length + 15) // 16))
    return b"".join(blocks)[:length]


def _chacha_block(key: bytes, counter: int) -> bytes:
    def turn(s: list[int], a: int, b: int, c: int, d: int) -> None:
        for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            s[z] ^= s[x]
            s[z] = (s[z] << bits | s[z] >> (32 - bits)) & 0xFFFFFFFF

    words = [int.from_bytes(b"expand 32-byte k"[i : i + 4], "little") for i in range(0, 16, 4)]
    words += [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)] + [
        counter,
        0,
        0,
        0,
    ]
    state = list(words)
    for _ in range(10):
        for column in range(4):
            turn(state, column, column + 4, column + 8, column + 12)
        for a, b, c, d in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            turn(state, a, b, c, d)
    mixed = zip(state, words, strict=True)
    return b"".join(((a + b) & 0xFFFFFFFF).to_bytes(4, "little") for a, b in mixed)


def chacha20_poly1305(key: bytes, text: bytes, bound_to: bytes) -> bytes:
    """RFC 8439 with nonce 0: ciphertext and tag."""
    stream = b"".join(_chacha_block(key, 1 + i) for i in range((len(text) + 63) // 64))
    cipher = bytes(a ^ b for a, b in zip(text, stream, strict=False))
    one_time = _chacha_block(key, 0)[:32]
    r = int.from_bytes(one_time[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    padded = [part + bytes(-len(part) % 16) for part in (bound_to, cipher)]
    data = (
        b"".join(padded) + len(bound_to).to_bytes(8, "little") + len(cipher).to_bytes(8, "little")
    )
    total = 0
    for i in range(0, len(data), 16):
        total = (total + int.from_bytes(data[i : i + 16], "little") + (1 << 128)) * r % (2**130 - 5)
    tag = (total + int.from_bytes(one_time[16:], "little")) & (1 << 128) - 1
    return cipher + tag.to_bytes(16, "little")


class CountedDraws:
    """ "Random" bytes of a test: SHA-256 of a label and a counter."""

    def __init__(self, label: str) -> None:
        self.label, self.count = label, 0

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return hashlib.sha256(f"{self.label} {self.count}".encode()).digest()[:size]


def merkle_root_of(leaves: list[bytes]) -> bytes:
    """By recursion: the left side holds the largest power of two below the count."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1
    while 2 * left < len(leaves):
        left *= 2
    tag = "fedlora-secagg-1 node"
    return framed_hash(tag, merkle_root_of(leaves[:left]), merkle_root_of(leaves[left:]))


def secure_round(case: dict[str, Any]) -> dict[str, Any]:
    """One whole epoch of one attempt without drop-outs, from the inputs of a known-answer case."""
    names, values = case["names"], case["values"]
    n, bits = len(names), case["bits"]
    t, one = 2 * n // 3 + 1, (1).to_bytes(8, "big")
    federation, run = case["federation"].encode(), case["run"].encode()
    tag = "fedlora-secagg-1 "
    epoch = framed_hash(tag + "epoch", federation, run, one, one, one)
    setup = framed_hash(tag + "setup", epoch, one)
    context = framed_hash(
        tag + "input", setup, one, case["adapter"].encode(), case["base"].encode()
    )
    draws = {name: CountedDraws(name) for name in names}
    c: dict[str, bytes] = {}
    b: dict[str, bytes] = {}
    s: dict[str, bytes] = {}
    for name in names:
        c[name], b[name], s[name] = (draws[name](32) for _ in range(3))
    members = [
        framed_bytes(b"member", name.encode(), bytes.fromhex(key), x25519(c[name]), x25519(s[name]))
        for name, key in zip(names, case["identities"], strict=True)
    ]
    cohort = framed_hash(tag + "cohort", epoch, *members)
    entries, sealed = [], {}
    for name in names:
        parts = {}
        for kind, secret in (("b", b[name]), ("s", s[name])):
            terms = [
                int.from_bytes(each, "big")
                for each in [secret, *(draws[name](32) for _ in range(t - 1))]
            ]
            parts[kind] = [
                sum(a * x**i for i, a in enumerate(terms)) % P256 for x in range(1, n + 1)
            ]
        leaves = []
        for place, other in enumerate(names):
            mine = {kind: parts[kind][place].to_bytes(32, "big") for kind in "bs"}
            label = (cohort, name.encode(), other.encode(), one)
            hashes = [
                framed_hash(tag + "share", *label, kind.encode(), mine[kind]) for kind in "bs"
            ]
            leaves.append(framed_hash(tag + "leaf", b"".join(hashes)))
            if other != name:
                secret = x25519(c[name], x25519(c[other]))
                info = framed_bytes(b"share", name.encode(), other.encode())
                key = hkdf_sha256(secret, framed_bytes(b"salt", cohort), info)
                bound = framed_bytes(
                    (tag + "sealed").encode(), cohort, name.encode(), other.encode()
                )
                sealed[f"{name} to {other}"] = chacha20_poly1305(
                    key, mine["b"] + mine["s"], bound
                ).hex()
        seeds = framed_hash(tag + "seed", cohort, name.encode(), one, b[name])
        entries.append(framed_bytes(b"dealer", name.encode(), merkle_root_of(leaves), seeds))
    dealers = framed_hash(tag + "dealers", cohort, *entries)
    survivors = framed_hash(tag + "survivors", context, dealers, *(name.encode() for name in names))
    vectors = {}
    weights = aes_ctr(framed_hash(tag + "check", context), 8 * len(values[0]))
    size, width = len(values[0]), bits // 8
    for index, name in enumerate(names):
        linear = sum(
            int.from_bytes(weights[8 * k : 8 * k + 8], "little") * value
            for k, value in enumerate(values[index])
        )
        words = [*values[index], 1, linear]
        salts = (
            framed_bytes(b"salt", context, dealers),
            framed_bytes(b"salt", context, cohort, dealers),
        )
        masks = [(1, hkdf_sha256(b[name], salts[0], b"seed"))]
        for other in names:
            if other != name:
                low, high = sorted((name, other))
                info = framed_bytes(b"mask", low.encode(), high.encode())
                secret = x25519(s[name], x25519(s[other]))
                masks.append((1 if name < other else -1, hkdf_sha256(secret, salts[1], info)))
        for sign, key in masks:
            stream = aes_ctr(key, size * width + 16)
            for k in range(size + 2):
                at, step = (k * width, width) if k < size else (size * width + 8 * (k - size), 8)
                words[k] += sign * int.from_bytes(stream[at : at + step], "little")
        body = b"".join((word % (1 << bits)).to_bytes(width, "little") for word in words[:size])
        tail = b"".join((word % (1 << 64)).to_bytes(8, "little") for word in words[size:])
        vectors[name] = (body + tail).hex()
    return {
        "context": context.hex(),
        "cohort": cohort.hex(),
        "dealers": dealers.hex(),
        "survivors": survivors.hex(),
        "sealed": sealed,
        "vectors": vectors,
        "sum": [sum(column) for column in zip(*values, strict=True)],
    }


def counts_by_ones(model: AdapterModel, held: ClientData, cells: Cells) -> npt.NDArray[np.float64]:
    """(cells,) of a hold-out: each record by itself, each unit's histogram averaged."""
    total = np.zeros(cells.size)
    for unit in range(len(held.units)):
        start, stop = held.units.offsets[unit : unit + 2]
        rows = held.units.records[start:stop]
        for row in rows:
            batch = held.encoded.batch(np.array([row]), model.pad, model.device)
            with torch.no_grad():
                scores = model.logits(batch)
            true, guess = int(batch.targets[0]), int(scores.argmax())
            loss = float(model.task.losses(scores, batch)[0])
            place = 0
            for kind, shape in cells.shapes.items():
                inside = {
                    "right": true == guess,
                    "classes": 2 * true + (true == guess),
                    "confusion": cells.classes * true + guess,
                    "loss": sum(loss > edge for edge in EDGES),
                    "groups": 2 * (0 if held.groups is None else int(held.groups[row]))
                    + (true == guess),
                }[kind]
                total[place + inside] += 1 / len(rows) / np.sqrt(len(cells.counts))
                place += int(np.prod(shape))
    return total


def personal_by_hand(
    model: AdapterModel, data: Encoded, start: AdapterState, rate: float, steps: int
) -> npt.NDArray[np.float64]:
    """(size,) after Adam's steps over all records, as its paper writes them: of the head and B."""
    moving = np.concatenate(
        [
            np.full(each.size, each.name.startswith("head.") or ".lora_B." in each.name)
            for each in start.spec.tensors
        ]
    )
    weights = start.vector.astype(np.float64)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, steps + 1):
        model.load(AdapterState(start.spec, weights.astype(np.float32)))
        rows = range(len(data))
        gradient = sum(_gradient_of_one(model, data, row) for row in rows) / len(data)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        size = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        weights -= rate * np.where(moving, first / (1 - 0.9**step) / size, 0.0)
    return weights
