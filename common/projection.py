"""A frozen linear map between pooled features and the head, computed on public text alone.

Pooled hidden states are strongly correlated: a few directions carry most of their length and little of their
meaning. Centring them and whitening the leading principal directions of the *public* validation part spreads
a clipped gradient over what matters, and a head on k directions has fewer coordinates to noise. The map is
part of the frozen model: institutions receive it with the manifest, by digest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from fedlora.common.errors import BadInput
from fedlora.common.files import write_atomically
from fedlora.common.state import check_safetensors_header

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Projection:
    """x ↦ (x - mean) @ matrix, with `mean` (d,) and `matrix` (d, k), float32."""

    mean: Floats
    matrix: Floats

    @classmethod
    def fit(cls, features: Floats, directions: int, ridge: float) -> Projection:
        """Whiten the first `directions` principal directions of (n, d) public features.

        Direction i is divided by sqrt(λ_i + ridge · mean λ): `ridge` keeps weak directions from being blown up.
        """
        mean = features.mean(axis=0, dtype=np.float64)
        _, singular, rows = np.linalg.svd(features - mean, full_matrices=False)
        if directions > len(singular):
            raise BadInput(
                f"[model] projection = {directions}: found {len(singular)} public examples or features to fit it on"
            )
        variances = singular[:directions] ** 2 / len(features)
        matrix = rows[:directions].T / np.sqrt(variances + ridge * variances.mean())
        return cls(mean.astype(np.float32), matrix.astype(np.float32))

    @property
    def digest(self) -> str:
        """sha256 over shapes and little-endian values."""
        hasher = hashlib.sha256(repr((self.mean.shape, self.matrix.shape)).encode())
        for part in (self.mean, self.matrix):
            hasher.update(np.ascontiguousarray(part.astype("<f4")).tobytes())
        return "sha256:" + hasher.hexdigest()

    def write(self, path: Path) -> None:
        write_atomically(path, bytes(save({"mean": self.mean, "matrix": np.ascontiguousarray(self.matrix)})))

    @classmethod
    def read(cls, path: Path) -> Projection:
        """BadInput unless `path` is a safetensors file of a finite mean and a matrix that fits it."""
        data = path.read_bytes()
        check_safetensors_header(data, str(path))
        try:
            parts = load(data)
        except Exception as error:  # the library raises several unrelated types
            raise BadInput(f"{path}: found an unreadable safetensors file ({error})") from error
        shapes = {name: value.shape for name, value in parts.items()}
        if set(parts) != {"mean", "matrix"} or shapes["matrix"][:1] != shapes["mean"] or len(shapes["matrix"]) != 2:
            raise BadInput(f"{path}: found {shapes}, expected mean (d,) and matrix (d, k)")
        if any(value.dtype != np.float32 or not np.isfinite(value).all() for value in parts.values()):
            raise BadInput(f"{path}: found values that are not finite float32")
        return cls(parts["mean"], parts["matrix"])
