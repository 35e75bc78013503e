"""A released adapter as a whole model: LoRA added to the base's weights.

What transformers, vLLM and others load without PEFT. A head of ours is no part of a transformers
model: it lies beside the merged backbone, with the description that says how it is read.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from fedlora.common.adapter.peft import LoadedAdapter, load_adapter
from fedlora.common.adapter.released import DESCRIPTION, HEAD, refuse_used
from fedlora.common.errors import BadInput
from fedlora.common.model.projection import PROJECTION

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_released(released: Path, base: str, folder: Path, dtype: str) -> None:
    """`write_merged` of the adapter in the folder `released`; `base` as `load_adapter` takes it."""
    write_merged(load_adapter(released, base), released, folder, dtype)


def write_merged(adapter: LoadedAdapter, released: Path, folder: Path, dtype: str) -> None:
    """Write the merged model and its tokenizer into `folder`, which must be new.

    The sum is made in the base's own type, and rounded to `dtype` once. `released` is where the
    adapter was loaded from. BadInput for another type, or a folder that is not empty.
    """
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    refuse_used(folder)
    # PEFT adds in place, and the adapter that was given is still in use
    network: Any = copy.deepcopy(adapter.model.network.backbone)
    merged = network.merge_and_unload(safe_merge=True).to(DTYPES[dtype])
    folder.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(folder, safe_serialization=True)
    adapter.model.tokenizer.save_pretrained(folder)
    for name in (HEAD, PROJECTION, DESCRIPTION):
        if (released / HEAD).is_file() and (released / name).is_file():
            shutil.copyfile(released / name, folder / name)
