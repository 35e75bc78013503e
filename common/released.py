"""A released adapter as files, read without the network that it belongs to: what it is, and that it is whole.

    adapter_config.json, adapter_model.safetensors    PEFT's
    head.safetensors, projection.safetensors          the head and the map below it, where they are ours
    fedlora.json                                      what PEFT's configuration has no place for
    spec.json                                         names and shapes in the order of the flat vector: its SHA-256
                                                      is the spec's digest, and with it the state's can be computed

Needs neither torch nor PEFT, so whoever receives an adapter can check it before installing either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from fedlora.common.base import refuse_code
from fedlora.common.errors import BadInput
from fedlora.common.messages import build_strictly
from fedlora.common.projection import PROJECTION, Projection
from fedlora.common.state import HEAD_PREFIX, AdapterSpec, AdapterState, TensorSpec, check_safetensors_header

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
DESCRIPTION, SPEC = "fedlora.json", "spec.json"
FILES = (CONFIG, WEIGHTS, HEAD, PROJECTION, DESCRIPTION, SPEC)


@dataclass(frozen=True)
class Description:
    """How to build the network that an exported adapter belongs to."""

    task: str
    labels: tuple[str, ...]
    base: str
    base_digest: str
    max_length: int
    pooling: str
    pooled_layers: tuple[int, ...]
    head_hidden: int
    head_scale: float
    projection_digest: str
    variant: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    seed: int
    adapter_digest: str

    @property
    def digest(self) -> str:
        """Of all that decides what the exported files compute; it lies beside them, and is checked on load."""
        return "sha256:" + hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def write_description(folder: Path, description: Description, spec: AdapterSpec) -> None:
    """fedlora.json and spec.json."""
    table = asdict(description) | {"digest": description.digest}
    (folder / DESCRIPTION).write_text(json.dumps(table, indent=2) + "\n")
    (folder / SPEC).write_text(json.dumps([[each.name, list(each.shape)] for each in spec.tensors]))


def read_released(folder: Path) -> tuple[Description, AdapterState]:
    """What lies in `folder`, every file checked against its description; BadInput names what is wrong."""
    description = read_description(folder)
    check_peft_config(folder, description)
    read_projection(folder, description)
    return description, read_state(folder, read_spec(folder), description)


def read_state(folder: Path, spec: AdapterSpec, description: Description) -> AdapterState:
    """The tensors of both files as one state; BadInput where they are not the ones described."""
    named: dict[str, npt.NDArray[np.float32]] = {}
    for path in (folder / WEIGHTS, folder / HEAD):
        if path.is_file():
            data = path.read_bytes()
            check_safetensors_header(data, str(path))
            try:
                named.update({_spec_name(key): value for key, value in load(data).items()})
            except Exception as error:  # the library raises several unrelated types
                raise BadInput(f"{path}: found an unreadable safetensors file ({error})") from error
    expected = {tensor.name for tensor in spec.tensors}
    frozen = {name for name in named if ".lora_A." in name and name not in expected}  # FFA: part of the base
    _check_frozen(folder, {name: named.pop(name) for name in frozen}, expected, description.seed)
    state = AdapterState.from_named(spec, named, str(folder))
    if state.digest != description.adapter_digest:
        raise BadInput(f"{folder}: found adapter {state.digest}, expected {description.adapter_digest}")
    return state


def read_description(folder: Path) -> Description:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise BadInput(f"{path}: missing, expected the description of an exported adapter")
    try:
        table = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: found a description that can't be read ({error})") from error
    if not isinstance(table, dict):
        raise BadInput(f"{path}: found {type(table).__name__}, expected a table")
    digest = table.pop("digest", None)
    for name, kind in (("labels", str), ("targets", str), ("pooled_layers", int), ("layers", int)):
        items = table.get(name)
        if not isinstance(items, list) or any(type(item) is not kind for item in items):
            raise BadInput(f"{path} {name}: expected a list, each {kind.__name__}")
        table[name] = tuple(items)
    description = build_strictly(Description, table, str(path))
    if description.seed < 0:
        raise BadInput(f"{path} seed: found {description.seed}, expected 0 or more")
    if digest != description.digest:
        raise BadInput(f"{path} digest: found {digest}, expected {description.digest}")
    return description


def check_peft_config(folder: Path, description: Description) -> None:
    """BadInput unless PEFT would build the network that is described here."""
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise BadInput(
            f"{folder}: expected {' and '.join((CONFIG, WEIGHTS))}; pickled weights are never opened"
        )
    refuse_code(path)
    table: dict[str, Any] = json.loads(path.read_bytes())
    targets = table.get("target_modules")
    for name, found, expected in (
        ("peft_type", table.get("peft_type"), "LORA"),
        ("r", table.get("r"), description.rank),
        ("lora_alpha", table.get("lora_alpha"), description.alpha),
        (
            "target_modules",
            sorted(map(str, targets)) if isinstance(targets, list) else targets,
            [*description.targets],
        ),
        ("layers_to_transform", table.get("layers_to_transform") or [], [*description.layers]),
    ):
        if found != expected:
            raise BadInput(f"{path} {name}: found {found!r}, expected {expected!r}")


def read_projection(folder: Path, description: Description) -> Projection | None:
    """The map below the head, if there is one; BadInput where it is another one than described."""
    if not description.projection_digest:
        return None
    if not (folder / PROJECTION).is_file():
        raise BadInput(f"{folder / PROJECTION}: missing, expected the map below the head")
    projection = Projection.read(folder / PROJECTION)
    if projection.digest != description.projection_digest:
        raise BadInput(
            f"{folder / PROJECTION}: found {projection.digest}, expected {description.projection_digest}"
        )
    return projection


def read_spec(folder: Path) -> AdapterSpec:
    """Names and shapes in the order of the vector; BadInput where the file says something else."""
    path = folder / SPEC
    if not path.is_file():
        raise BadInput(f"{path}: missing, expected names and shapes of the adapter's tensors")
    try:
        rows = [(name, tuple(shape)) for name, shape in json.loads(path.read_bytes())]
    except (ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: found no list of names and shapes") from error
    for name, shape in rows:
        if not isinstance(name, str) or any(type(size) is not int or size < 0 for size in shape):
            raise BadInput(f"{path}: found an entry that is no name and shape")
    return AdapterSpec(tuple(TensorSpec(name, shape) for name, shape in rows))


def _check_frozen(
    folder: Path, found: Mapping[str, npt.NDArray[np.float32]], trained: set[str], seed: int
) -> None:
    """A frozen A in the file is the one that its seed gives: PEFT reads the file, and a node draws it anew.

    The draws are those of `model.build_model`, which takes the frozen ones first, by name.
    """
    twins = {name.replace(".lora_B.", ".lora_A.") for name in trained if ".lora_B." in name}
    if other := sorted(set(found) ^ (twins - trained)):
        raise BadInput(f"{folder / WEIGHTS} {other[0]}: expected a frozen A beside each trained B")
    generator = np.random.Generator(np.random.Philox(seed))
    for name, value in sorted(found.items()):
        bound = value.shape[-1] ** -0.5 if value.ndim == 2 and value.size else 0.0
        drawn = generator.uniform(-bound, bound, value.shape).astype(np.float32)
        if value.ndim != 2 or not np.array_equal(value, drawn):
            raise BadInput(f"{folder / WEIGHTS} {name}: found another frozen A than the seed gives")


def _spec_name(saved: str) -> str:
    """PEFT stores a model's own head under the module's name; a spec calls it `head.`."""
    if saved.startswith(HEAD_PREFIX) or ".lora_" in saved:
        return saved
    return HEAD_PREFIX + ".".join(saved.split(".")[-2:])
