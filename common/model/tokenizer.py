"""A base's own tokenizer: there, whole, and made for this base.

transformers makes an empty tokenizer where the files are missing, in which every word is the same
unknown one: nothing else would say that a run learnt nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from fedlora.common.errors import BadInput

# Whatever the class: files from which transformers makes a tokenizer.
_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model")


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer; code in the folder is never run. BadInput where there is none."""
    where = f"[model] base = {folder}"
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises a dozen unrelated types
        line = next(iter(str(error).splitlines()), "")[:200]
        raise BadInput(
            f"{where}: found no tokenizer that transformers reads"
            f" ({type(error).__name__}: {line}), expected the model's own"
        ) from error
    named = type(tokenizer).vocab_files_names.values()
    # One of bytes or of code points has no file.
    if named and not any((folder / name).is_file() for name in {*_FILES, *named}):
        raise BadInput(
            f"{where}: found no tokenizer, expected its files, {' or '.join(sorted(set(named)))}"
        )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise BadInput(f"{where}: found a tokenizer without words, expected the model's own")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def check_fit(tokenizer: Any, rows: int, where: str) -> None:
    """BadInput unless what a text may become has its place among an embedding's `rows`.

    Spare rows are usual, for a multiple of 64 say; twice too many are another model's.
    """
    if 2 * len(tokenizer) < rows:
        raise BadInput(
            f"{where}: found a tokenizer of {len(tokenizer)} tokens, expected about {rows}, for"
            " which the model has embeddings"
        )
    special = set(tokenizer.all_special_ids)
    framed = tokenizer("")["input_ids"]  # control tokens in a text stay words: no other comes
    beyond = {
        token: id_
        for token, id_ in tokenizer.get_vocab().items()
        if id_ >= rows and (id_ not in special or id_ in framed)
    }
    if beyond:
        token, id_ = min(beyond.items(), key=lambda pair: pair[1])
        raise BadInput(
            f"{where}: found token {token[:40]!r} with id {id_}, expected ids below {rows}, for"
            " which the model has embeddings"
        )
