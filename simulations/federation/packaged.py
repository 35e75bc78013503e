"""Configurations that come with the package, by name, and the corpus of the quickstart's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedlora.common.config.schema import DataConfig
from fedlora.common.config.toml import suggestion
from fedlora.common.errors import BadInput
from fedlora.simulations.federation.corpus import Corpus, generate, write, write_records

PUBLIC = 800  # records of the quickstart's corpus that are its public validation file


def packaged_config(path: Path) -> Path:
    """A file as given, or the packaged configuration of that name; BadInput for what is neither."""
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    packaged = {each.stem: each for each in (Path(__file__).parents[1] / "configs").glob("*.toml")}
    if path.name not in packaged:
        raise BadInput(
            f"{path}: no such file, expected a TOML file or one of"
            f" {', '.join(sorted(packaged))}{suggestion(path.name, packaged)}"
        )
    return packaged[path.name]


def with_corpus(data: DataConfig, seed: int, folder: Path) -> DataConfig:
    """The quickstart's corpus, which is made up in `folder`, in place of the files of `data`."""
    corpus, public = generate(seed), folder / "validation.jsonl"
    train, test = write(Corpus(corpus.train[PUBLIC:], corpus.test), folder)
    write_records(public, corpus.train[:PUBLIC])
    return replace(data, train=str(train), test=str(test), validation=str(public))
