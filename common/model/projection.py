"""A frozen map between pooled features and the head, fitted on public text alone.

Pooled hidden states are strongly correlated: a few directions carry most of their length and little
of their meaning. Two stages make them easier for a clipped, noised, linear head:

    whiten   centre, and divide each of the leading principal directions by its spread, so that a
             clipped gradient speaks for what matters, and fewer coordinates are noised
    kernel   similarities exp(γ(z·l - 1)) to public landmarks l, whitened likewise: a linear head
             on them is a kernel machine (Nyström features, Williams and Seeger 2001), at the noise
             of a linear head

The map is part of the frozen model: institutions receive it with the manifest, by digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.model.state import check_safetensors_header

PROJECTION = "projection.safetensors"  # in a run's folder, and in what is exported

Floats = npt.NDArray[np.float32]
LEADING = 256  # directions whose mean variance a ridge is relative to
SMALLEST = 1e-6  # eigenvalues of a kernel matrix below it are rounding


@dataclass(frozen=True, eq=False)
class Affine:
    """x ↦ x @ matrix - shift, with `matrix` (d, k) and `shift` (k,), float32."""

    matrix: Floats
    shift: Floats

    @classmethod
    def whitening(cls, features: npt.NDArray[np.floating], directions: int, ridge: float) -> Affine:
        """Centre (n, d) features and whiten their first `directions` principal directions.

        Direction i is divided by sqrt(λ_i + ridge · mean λ): the ridge keeps weak directions from
        being blown up.
        """
        if not np.isfinite(features).all():
            raise BadInput("[model] projection: found features of public text that are not finite")
        mean = features.mean(axis=0, dtype=np.float64)
        check_directions(directions, min(features.shape))
        _, singular, rows = np.linalg.svd(features - mean, full_matrices=False)
        variances = singular[:directions] ** 2 / len(features)
        matrix = rows[:directions].T / _spread(variances, ridge)
        return cls(matrix.astype(np.float32), (mean @ matrix).astype(np.float32))

    @classmethod
    def whitening_kernel(
        cls, similar: npt.NDArray[np.float64], directions: int, ridge: float
    ) -> Affine:
        """Of similarities to landmarks, given those (m, m) among the landmarks themselves.

        What `whitening` makes of the kernel's feature map, K to the power of a half, without it:
        the leading eigenvectors of the centred matrix are all that is needed (kernel PCA,
        Schölkopf, Smola and Müller 1998).
        """
        from scipy.linalg import eigh  # a node never fits one

        count = len(similar)
        check_directions(directions, count)
        mean = similar.mean(axis=0)
        centred = similar - mean - mean[:, None] + mean.mean()
        values, vectors = eigh(centred, subset_by_index=[count - directions, count - 1])
        # at the end of the rank they mix with what is 0 on all landmarks but their mean
        vectors -= vectors.mean(axis=0)
        values = np.maximum(values[::-1], SMALLEST)
        matrix = vectors[:, ::-1] / np.sqrt(values) / _spread(values / count, ridge)
        return cls(matrix.astype(np.float32), (mean @ matrix).astype(np.float32))


@dataclass(frozen=True, eq=False)
class Kernel:
    """z ↦ exp(γ(z @ landmarksᵀ - 1)) for rows z of length 1, then `affine`; `landmarks`: (m, k)."""

    landmarks: Floats
    gamma: float
    affine: Affine


@dataclass(frozen=True, eq=False)
class Projection:
    """Whitening, and perhaps a kernel stage; rows are brought to length 1 after each."""

    whiten: Affine
    kernel: Kernel | None = None

    @classmethod
    def fit(
        cls,
        features: Floats,
        directions: int,
        ridge: float,
        kernel_directions: int = 0,
        gamma: float = 0.0,
    ) -> Projection:
        """From (n, d) public features; BadInput where they span fewer directions than asked for."""
        whiten = Affine.whitening(features, directions, ridge)
        if not kernel_directions:
            return cls(whiten)
        landmarks = _unit_rows(features @ whiten.matrix - whiten.shift)
        similar = np.exp(gamma * (landmarks @ landmarks.T - 1.0)).astype(np.float64)
        affine = Affine.whitening_kernel(similar, kernel_directions, ridge)
        return cls(whiten, Kernel(landmarks.astype(np.float32), gamma, affine))

    @property
    def width(self) -> int:
        """Features that the head receives."""
        return len(self.whiten.shift if self.kernel is None else self.kernel.affine.shift)

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and little-endian values."""
        hasher = hashlib.sha256()
        for name, part in sorted(self._parts().items()):
            hasher.update(f"{name}{part.shape}".encode())
            hasher.update(np.ascontiguousarray(part.astype("<f4")).tobytes())
        return "sha256:" + hasher.hexdigest()

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of its parts."""
        return tuple(sorted((name, part.shape) for name, part in self._parts().items()))

    def stand_in(self) -> Projection:
        """One of the same shapes with values of our own, of the size that a fit gives."""
        rng = np.random.default_rng(0)

        def affine(one: Affine) -> Affine:
            matrix = rng.normal(0, len(one.matrix) ** -0.5, one.matrix.shape)
            return Affine(
                matrix.astype(np.float32), rng.normal(0, 0.1, one.shift.shape).astype(np.float32)
            )

        if self.kernel is None:
            return Projection(affine(self.whiten))
        landmarks = _unit_rows(rng.normal(0, 1, self.kernel.landmarks.shape)).astype(np.float32)
        return Projection(affine(self.whiten), Kernel(landmarks, 1.0, affine(self.kernel.affine)))

    def write(self, path: Path) -> None:
        """The map as safetensors, whole or not at all; `read` gives it back to the last bit."""
        write_atomically(
            path, bytes(save({n: np.ascontiguousarray(p) for n, p in self._parts().items()}))
        )

    @classmethod
    def read(cls, path: Path) -> Projection:
        """BadInput unless `path` is safetensors of finite float32 parts that fit each other."""
        return cls.from_bytes(path.read_bytes(), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Projection:
        """Likewise, from the bytes of such a file; `path` is what errors name."""
        check_safetensors_header(data, path)
        try:
            parts = load(data)
        except Exception as error:  # the library raises several unrelated types
            raise BadInput(f"{path}: found an unreadable safetensors file ({error})") from error
        _check_parts(parts, path)
        whiten = Affine(parts["matrix"], parts["shift"])
        if "landmarks" not in parts:
            return cls(whiten)
        affine = Affine(parts["kernel_matrix"], parts["kernel_shift"])
        return cls(whiten, Kernel(parts["landmarks"], float(parts["gamma"][0]), affine))

    def _parts(self) -> dict[str, Floats]:
        parts = {"matrix": self.whiten.matrix, "shift": self.whiten.shift}
        if self.kernel is None:
            return parts
        return parts | {
            "landmarks": self.kernel.landmarks,
            "gamma": np.array([self.kernel.gamma], dtype=np.float32),
            "kernel_matrix": self.kernel.affine.matrix,
            "kernel_shift": self.kernel.affine.shift,
        }


def check_directions(directions: int, spanned: int) -> None:
    """BadInput where more directions are asked for than public text spans, or can span."""
    if directions > spanned:
        raise BadInput(
            f"[model] projection: found {directions} directions, expected at most the"
            f" {spanned} that the public texts span"
        )


def _spread(variances: npt.NDArray[np.float64], ridge: float) -> npt.NDArray[np.float64]:
    """What directions of these variances, the largest first, are divided by."""
    found: npt.NDArray[np.float64] = np.sqrt(variances + ridge * variances[:LEADING].mean())
    return found


def _unit_rows(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    result: npt.NDArray[np.floating] = values / np.maximum(lengths, 1e-12)
    return result


def _check_parts(parts: Mapping[str, npt.NDArray[np.float32]], path: str) -> None:
    shapes = {name: value.shape for name, value in parts.items()}
    plain = {"matrix", "shift"}
    if set(parts) not in (plain, plain | {"landmarks", "gamma", "kernel_matrix", "kernel_shift"}):
        raise BadInput(f"{path}: found {sorted(parts)}, expected a projection's parts")
    if any(value.dtype != np.float32 or not np.isfinite(value).all() for value in parts.values()):
        raise BadInput(f"{path}: found values that are not finite float32")
    fits = len(shapes["matrix"]) == 2 and shapes["shift"] == shapes["matrix"][1:]
    if "landmarks" in parts:
        fits = fits and shapes["gamma"] == (1,) and shapes["landmarks"][1:] == shapes["shift"]
        fits = fits and shapes["kernel_matrix"] == (shapes["landmarks"][0], *shapes["kernel_shift"])
    if not fits:
        raise BadInput(f"{path}: found shapes {shapes}, which do not fit each other")
