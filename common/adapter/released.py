"""A released adapter as files, read without its network: what it is, and that it is whole.

    adapter_config.json, adapter_model.safetensors    PEFT's
    head.safetensors, projection.safetensors          the head and the map below it, if ours
    fedlora.json    what PEFT's configuration has no place for
    spec.json       names and shapes in the order of the flat vector: its SHA-256 is the spec's
                    digest, and with it the state's can be computed

Needs neither torch nor PEFT, so whoever receives an adapter can check it before installing either.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from fedlora.common.codec.strict import build, json_table
from fedlora.common.config.task_names import BUILT_IN, MEDIA
from fedlora.common.config.toml import Bounds
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import AdapterLayout
from fedlora.common.model.base import refuse_code
from fedlora.common.model.projection import PROJECTION, Projection
from fedlora.common.model.state import (
    HEAD_PREFIX,
    AdapterSpec,
    AdapterState,
    TensorSpec,
    check_safetensors_header,
)

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
DESCRIPTION, SPEC = "fedlora.json", "spec.json"
FILES = (CONFIG, WEIGHTS, HEAD, PROJECTION, DESCRIPTION, SPEC)
PEFT_MODEL = "base_model.model."  # what PEFT puts before a name of the base's
PEFT_HEADS = ["classifier", "score"]  # how the modules end that PEFT takes for a model's own head
PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}  # of a base's own scores
# What PEFT writes that's neither null, false nor empty, and the same in all our networks.
PEFT_DEFAULTS = {
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}


@dataclass(frozen=True)
class Description(AdapterLayout):
    """How to build the network that an exported adapter belongs to."""

    task: str
    labels: tuple[str, ...]
    base: str
    base_digest: str
    max_length: int
    projection_digest: str
    seed: int = field(metadata={"rule": Bounds(0, (1 << 63) - 1)})
    adapter_digest: str

    @property
    def digest(self) -> str:
        """Of all that decides what the exported files compute; kept with them, checked on load."""
        return (
            "sha256:"
            + hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        )


def write_description(folder: Path, description: Description, spec: AdapterSpec) -> None:
    """fedlora.json and spec.json."""
    (folder / DESCRIPTION).write_text(description_text(description), encoding="utf-8")
    (folder / SPEC).write_text(
        json.dumps([[each.name, list(each.shape)] for each in spec.tensors]), encoding="utf-8"
    )


def description_text(description: Description) -> str:
    """What fedlora.json holds."""
    return json.dumps(asdict(description) | {"digest": description.digest}, indent=2) + "\n"


def read_released(folder: Path) -> tuple[Description, AdapterState]:
    """What lies in `folder`, each file held against its description; BadInput: what is wrong."""
    description = read_description(folder)
    check_peft_config(folder, description)
    read_projection(folder, description)
    return description, read_state(folder, read_spec(folder), description)


def copy_released(folder: Path, target: Path) -> None:
    """Copy an adapter's files, once each was held against its description, into a new folder.

    BadInput where one is not as described, or `target` holds files.
    """
    read_released(folder)
    refuse_used(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def refuse_used(folder: Path) -> None:
    """BadInput for a folder that is to be written and holds files."""
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder}: found files, expected a new folder")


def read_state(folder: Path, spec: AdapterSpec, description: Description) -> AdapterState:
    """The tensors of both files as one state; BadInput where they are not the ones described."""
    named: dict[str, npt.NDArray[np.float32]] = {}
    heads = _own_heads(spec) if description.pooling == "default" else []
    for path in (folder / WEIGHTS, folder / HEAD):
        found = _read_tensors(path, heads) if path.is_file() else {}
        if twice := sorted(set(named) & set(found)):
            raise BadInput(f"{path}: found a second {twice[0]}, expected each tensor in one file")
        named.update(found)
    expected = {tensor.name for tensor in spec.tensors}
    # FFA: part of the base
    frozen = {name for name in named if ".lora_A." in name and name not in expected}
    _check_frozen(folder, {name: named.pop(name) for name in frozen}, expected, description.seed)
    state = AdapterState.from_named(spec, named, str(folder))
    if state.digest != description.adapter_digest:
        raise BadInput(
            f"{folder}: found adapter {state.digest}, expected {description.adapter_digest}"
        )
    return state


def read_description(folder: Path) -> Description:
    """What fedlora.json says; BadInput where it is missing or faulty."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise BadInput(f"{path}: missing, expected the description of an exported adapter")
    table = json_table(path.read_bytes(), str(path))
    digest = table.pop("digest", None)
    description = build(Description, table, str(path))
    if digest != description.digest:
        raise BadInput(f"{path} digest: found {digest}, expected {description.digest}")
    return description


def check_peft_config(folder: Path, description: Description) -> None:
    """BadInput unless PEFT would build the network described here: every key counts."""
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise BadInput(
            f"{folder}: expected {' and '.join((CONFIG, WEIGHTS))}; pickled weights are never"
            " opened"
        )
    refuse_code(path)
    table: dict[str, Any] = json.loads(path.read_bytes())
    _check_base_name(path, table.pop("base_model_name_or_path", None), description)
    version = table.pop("peft_version", None)  # PEFT's before 0.18 wrote none
    if version is not None and not (
        isinstance(version, str) and re.fullmatch(r"[\w.+@-]{1,80}", version)
    ):
        raise BadInput(f"{path} peft_version: found {_shown(version)}, expected a version")
    expected = _described_config(description, read_spec(folder), table.get("task_type"))
    for name in sorted(expected.keys() | table.keys()):
        decided, found = name in expected or name in PEFT_DEFAULTS, _in_order(table.get(name))
        value = expected.get(name, PEFT_DEFAULTS.get(name))
        if name not in table and name not in expected:
            continue  # an older PEFT's, which has no such thing
        if not (_same(found, value) if decided else _is_neutral(found)):
            what = json.dumps(value) if decided else "null, false or empty"
            raise BadInput(f"{path} {name}: found {_shown(found)}, expected {what}")


def base_was_a_folder(folder: Path, description: Description) -> bool:
    """Whether `description.base` is a place, not a name: PEFT's file has its digest then."""
    name = json.loads((folder / CONFIG).read_bytes()).get("base_model_name_or_path")
    return bool(name == description.base_digest != description.base)


def published(folder: Path, description: Description) -> Description:
    """What a release says: of a base in a folder its name only; a path is nobody's business."""
    if not base_was_a_folder(folder, description):
        return description
    return replace(description, base=Path(description.base).name.strip(".") or "base")


def _own_heads(spec: AdapterSpec) -> list[str]:
    """The modules of a model's own head, which is trained above the base."""
    heads = [each.name for each in spec.tensors if each.name.startswith(HEAD_PREFIX)]
    return sorted({name.split(".")[1] for name in heads})


def _peft_kind(description: Description, found: Any) -> str | None:
    """PEFT's kind of network; of a task of one's own, which need not be here, the file says it:
    names and shapes of all tensors are the description's in any case.
    """
    if description.task in PEFT_TASKS:
        return PEFT_TASKS[description.task]
    if description.pooling != "default":
        return "FEATURE_EXTRACTION"
    if description.task in BUILT_IN:
        return None if description.task in MEDIA else "SEQ_CLS"
    others: tuple[str | None, ...] = (None, *PEFT_TASKS.values())
    return next((each for each in others if each == found), "SEQ_CLS")


def _saved_heads(spec: AdapterSpec, kind: str | None) -> list[str]:
    """How the modules end that PEFT saves whole: of texts those that it knows, too.

    None where the head is ours, or a language model's.
    """
    if kind is None:  # of a medium: PEFT knows none by itself
        return _own_heads(spec)
    if kind != "SEQ_CLS":
        return []
    more = (name for name in _own_heads(spec) if not name.endswith(tuple(PEFT_HEADS)))
    return sorted({*PEFT_HEADS, *more})


def _described_config(description: Description, spec: AdapterSpec, found: Any) -> dict[str, Any]:
    """What a description decides of PEFT's configuration, lists in order."""
    kind = _peft_kind(description, found)
    return {
        "peft_type": "LORA",
        "task_type": kind,
        "r": description.rank,
        "lora_alpha": description.alpha,
        "target_modules": sorted(description.targets),
        "layers_to_transform": sorted(description.layers) or None,
        "modules_to_save": _saved_heads(spec, kind) or None,
    }


def _check_base_name(path: Path, found: Any, description: Description) -> None:
    """PEFT's file names the base as the description does; a folder, by its digest."""
    if found not in (description.base, description.base_digest):
        expected = f"{_shown(description.base)} or {description.base_digest}"
        raise BadInput(
            f"{path} base_model_name_or_path: found {_shown(found)}, expected {expected}"
        )


def _in_order(found: Any) -> Any:
    """Lists of names or numbers sorted: PEFT writes sets as they come."""
    plain = isinstance(found, list) and {type(each) for each in found} in ({str}, {int})
    return sorted(found) if plain else found


def _same(found: Any, expected: Any) -> bool:
    """1 and 1.0 are, 1 and true are not."""
    return bool(found == expected) and isinstance(found, bool) == isinstance(expected, bool)


def _is_neutral(found: Any) -> bool:
    return found is None or found is False or found in ([], {})


def _shown(found: Any) -> str:
    """A value from outside, in short; however deep it is."""
    try:
        return repr(found)[:80]
    except RecursionError:
        return type(found).__name__


def read_projection(folder: Path, description: Description) -> Projection | None:
    """The map below the head, if there is one; BadInput where it is another one than described."""
    if not description.projection_digest:
        return None
    if not (folder / PROJECTION).is_file():
        raise BadInput(f"{folder / PROJECTION}: missing, expected the map below the head")
    projection = Projection.read(folder / PROJECTION)
    if projection.digest != description.projection_digest:
        raise BadInput(
            f"{folder / PROJECTION}: found {projection.digest}, expected"
            f" {description.projection_digest}"
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
    if len({name for name, _ in rows}) < len(rows):
        raise BadInput(f"{path}: found a name twice, expected each tensor once")
    return AdapterSpec(tuple(TensorSpec(name, shape) for name, shape in rows))


def _check_frozen(
    folder: Path, found: Mapping[str, npt.NDArray[np.float32]], trained: set[str], seed: int
) -> None:
    """A frozen A in the file is its seed's: PEFT reads the file, and a node draws it anew.

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


def _read_tensors(path: Path, heads: list[str]) -> dict[str, npt.NDArray[np.float32]]:
    """By their names in a spec; BadInput for a tensor that neither PEFT nor our head puts there."""
    data = path.read_bytes()
    check_safetensors_header(data, str(path))
    try:
        found = load(data)
    except Exception as error:  # the library raises several unrelated types
        raise BadInput(f"{path}: found an unreadable safetensors file ({error})") from error
    named: dict[str, npt.NDArray[np.float32]] = {}
    for key, value in sorted(found.items()):
        name = _spec_name(key, path, heads)
        if name in named:
            raise BadInput(f"{path} {key}: found a second {name}, expected one")
        named[name] = value
    return named


def _spec_name(saved: str, path: Path, heads: list[str]) -> str:
    """A LoRA tensor has its name; a model's own head is the module's to PEFT, `head.` to a spec."""
    if path.name == HEAD and saved.startswith(HEAD_PREFIX):
        return saved
    if path.name == WEIGHTS and ".lora_" in saved:
        return saved
    own = saved.removeprefix(PEFT_MODEL)
    if path.name == WEIGHTS and own != saved and own.split(".")[0].endswith(tuple(heads)):
        return HEAD_PREFIX + own
    raise BadInput(f"{path} {saved}: found a tensor that is neither LoRA's nor the head's")
