"""The adapter as a value: one flat float32 vector whose named parts a spec describes.

Aggregation, noise, masks, digests and files all see the same vector; names and shapes exist only at
the edges. Two states are equal exactly when spec and vector are equal bit for bit, and so are their
digests.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from fedlora.common.disk.mapped import by_stretches
from fedlora.common.errors import BadInput

Vector = npt.NDArray[np.float32]

MAX_TENSORS = 10_000
MAX_HEADER_BYTES = 4 << 20
PHASES = ("head", "lora", "adapter")  # what a phase moves: the head, the rest, or both
HALVES = ("B", "A")  # of LoRA, where a round moves one of them: "lora.B", "adapter.A"
COUNTED = "evaluation"  # it moves no adapter: of its answer, which is counts, all is noised
HEAD_PREFIX = "head."  # tensors of the task head; all others belong to the LoRA adapter


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of one trainable tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many coordinates it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class AdapterSpec:
    """The trainable tensors of a model, in the order in which they lie in the flat vector."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def size(self) -> int:
        """Number of float32 coordinates."""
        return sum(tensor.size for tensor in self.tensors)

    def slices(self) -> Iterator[tuple[TensorSpec, slice]]:
        """Each tensor with its place in the vector."""
        start = 0
        for tensor in self.tensors:
            yield tensor, slice(start, start + tensor.size)
            start += tensor.size

    def head_mask(self) -> npt.NDArray[np.bool_]:
        """(size,) true where a coordinate belongs to the task head."""
        mask = np.zeros(self.size, dtype=bool)
        for tensor, place in self.slices():
            mask[place] = tensor.name.startswith(HEAD_PREFIX)
        return mask

    def half_mask(self, half: str) -> npt.NDArray[np.bool_]:
        """(size,) true where a coordinate belongs to LoRA's A, or to its B: to all but A."""
        mask = np.zeros(self.size, dtype=bool)
        for tensor, place in self.slices():
            mask[place] = (".lora_A." in tensor.name) == (half == "A")
        return mask & ~self.head_mask()

    def moved_by(self, moves: str) -> npt.NDArray[np.bool_]:
        """(size,) true where a phase of that name, or a round that moves one half of LoRA ("lora.B"
        or "adapter.A"), moves a coordinate; BadInput if unknown.
        """
        if moves == COUNTED:
            return everywhere(self.size)
        phase, dot, half = moves.partition(".")
        known = half in HALVES and phase != "head" if dot else True
        if phase not in PHASES or not known:
            raise BadInput(f"manifest phase name: found {moves!r}, expected {', '.join(PHASES)}")
        if moves == "adapter":
            return everywhere(self.size)
        head = self.head_mask()
        if phase == "head":
            return head
        lora = self.half_mask(half) if half else ~head
        return head | lora if phase == "adapter" else lora

    @cached_property
    def digest(self) -> str:
        """sha256 over names and shapes."""
        listing = [[tensor.name, list(tensor.shape)] for tensor in self.tensors]
        return "sha256:" + hashlib.sha256(json.dumps(listing).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class AdapterState:
    """Values of an adapter: `vector` is (spec.size,) float32, read-only."""

    spec: AdapterSpec
    vector: Vector

    def __post_init__(self) -> None:
        if self.vector.shape != (self.spec.size,) or self.vector.dtype != np.float32:
            raise BadInput(
                f"adapter vector: found {self.vector.dtype} {self.vector.shape}, "
                f"expected float32 ({self.spec.size},)"
            )
        frozen = np.ascontiguousarray(self.vector).view()
        frozen.flags.writeable = False
        object.__setattr__(self, "vector", frozen)

    @classmethod
    def zeros(cls, spec: AdapterSpec) -> AdapterState:
        """The state in which every coordinate is 0."""
        return cls(spec, np.zeros(spec.size, dtype=np.float32))

    @classmethod
    def from_named(
        cls, spec: AdapterSpec, named: Mapping[str, npt.NDArray[np.float32]], where: str = "adapter"
    ) -> AdapterState:
        """Flatten tensors by name; BadInput lists each missing, extra, misshapen, not float32."""
        faults = _named_faults(spec, named, where)
        if faults:
            raise BadInput(faults)
        vector = np.empty(spec.size, dtype=np.float32)
        for tensor, place in spec.slices():
            vector[place] = named[tensor.name].ravel()
        return cls(spec, vector)

    def named(self) -> dict[str, npt.NDArray[np.float32]]:
        """Read-only views of the vector, by name and in shape."""
        return {
            tensor.name: self.vector[place].reshape(tensor.shape)
            for tensor, place in self.spec.slices()
        }

    @property
    def moves_base(self) -> bool:
        """Whether LoRA changes anything: where each B is 0, A does nothing."""
        return any(value.any() for name, value in self.named().items() if ".lora_B." in name)

    def to_bytes(self) -> bytes:
        """The state as a safetensors file."""
        return bytes(save(self.named()))

    @classmethod
    def from_bytes(cls, data: bytes, spec: AdapterSpec, where: str = "adapter") -> AdapterState:
        """Parse safetensors from outside; BadInput unless exactly the spec, all finite."""
        check_safetensors_header(data, where)
        try:
            named = load(data)
        except Exception as error:  # the library raises several unrelated types
            raise BadInput(f"{where}: found an unreadable safetensors file ({error})") from error
        state = cls.from_named(spec, named, where)
        if not np.isfinite(state.vector).all():
            raise BadInput(f"{where}: found a value that is not finite, expected finite float32")
        return state

    @cached_property
    def digest(self) -> str:
        """sha256 over the spec and the little-endian bytes of the vector."""
        hasher = hashlib.sha256(self.spec.digest.encode())
        for (part,) in by_stretches(self.vector):
            hasher.update(part.astype("<f4", copy=False).data)
        return "sha256:" + hasher.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterState) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def everywhere(size: int) -> npt.NDArray[np.bool_]:
    """(size,) true, read-only, in one byte."""
    return np.broadcast_to(np.True_, (size,))


def is_finite(values: npt.NDArray[np.floating[Any]]) -> bool:
    """Whether every value is a finite number; makes no array, which would be a quarter as large."""
    return all(
        math.isfinite(end)
        for (part,) in by_stretches(values.reshape(-1))
        for end in (part.min(initial=0.0), part.max(initial=0.0))
    )


def safetensors_pieces(named: Mapping[str, Vector]) -> Iterator[bytes | memoryview]:
    """A safetensors file of float32 vectors, in pieces for one pass: none is copied."""
    header, end = dict[str, object](), 0
    for name in sorted(named):
        start, end = end, end + named[name].nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(named[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in sorted(named):
        for (part,) in by_stretches(np.ascontiguousarray(named[name], dtype="<f4")):
            yield part.data.cast("B")


def safetensors_vectors(data: memoryview, where: str) -> dict[str, Vector]:
    """The vectors of such a file, as views of its bytes; BadInput for a header that is none."""
    header = check_safetensors_header(data, where)
    values = data[8 + struct.unpack("<Q", data[:8])[0] :]
    found = dict[str, Vector]()
    for name, entry in header.items():
        match entry:
            case {"dtype": "F32", "data_offsets": [int(start), int(end)]}:
                found[name] = np.frombuffer(values[start:end], dtype="<f4")
            case _:
                raise BadInput(f"{where} {name}: found {entry}, expected a float32 vector")
    return found


def check_safetensors_header(data: bytes | memoryview, where: str) -> dict[str, object]:
    """Bound a safetensors header before the library parses it; BadInput says what is wrong.

    The library itself accepts duplicate keys and spends seconds on headers of 100,000 tensors.
    """
    if len(data) < 8:
        raise BadInput(
            f"{where}: found {len(data)} bytes, expected a safetensors file (truncated?)"
        )
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise BadInput(
            f"{where}: found a header of {length} bytes in a file of {len(data)}, "
            f"expected at most {MAX_HEADER_BYTES} and within the file"
        )
    try:
        header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: found a bad safetensors header ({error})") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise BadInput(
            f"{where}: found a header that is not a table of at most {MAX_TENSORS} tensors"
        )
    return header


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _named_faults(
    spec: AdapterSpec, named: Mapping[str, npt.NDArray[np.float32]], where: str
) -> list[str]:
    expected = {tensor.name: tensor.shape for tensor in spec.tensors}
    faults = [
        f"{where} {name}: missing, expected {shape}"
        for name, shape in expected.items()
        if name not in named
    ]
    for name, value in named.items():
        if name not in expected:
            faults.append(
                f"{where} {name}: found an extra tensor, expected only those of the model's adapter"
            )
        elif value.shape != expected[name]:
            faults.append(f"{where} {name}: found shape {value.shape}, expected {expected[name]}")
        elif value.dtype != np.float32:
            faults.append(f"{where} {name}: found {value.dtype}, expected float32")
    return faults
