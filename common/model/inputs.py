"""What a base is given: words of a text, or values of another medium, all of one shape.

One class for each, chosen where a base is loaded. How a batch becomes the base's arguments, what
records of nobody's look like, and how long they may be, is asked here and known nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers

from fedlora.common.data.medium import Medium
from fedlora.common.errors import BadInput
from fedlora.common.libraries import library
from fedlora.common.model.behaviour import RECORDS, TOKENS, texts
from fedlora.common.model.tokenizer import check_fit, load_tokenizer
from fedlora.common.tasks.batch import Encoded, Ints
from fedlora.common.tasks.task import Task
from fedlora.common.tasks.texts import TextTask

Given = tuple[torch.Tensor, torch.Tensor]  # a batch's ids and mask


class Inputs(Protocol):
    """What one loaded base reads."""

    @property
    def reader(self) -> Any:
        """The base's own tokenizer, or processor."""

    @property
    def one_length(self) -> bool:
        """Whether all records are as long as one another."""

    @property
    def pad(self) -> int:
        """What fills a text up, behind the mask."""

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a transformer is called with for a batch (`common.tasks.batch.Batch`)."""

    def longest(self, network: Any, most: int, where: str) -> int:
        """How long a record may be, at most `most`; BadInput where the network can't read it."""

    def tried(self, device: torch.device, longest: int = TOKENS, seed: int = 0) -> Given:
        """`RECORDS` of nobody's, drawn; of texts the last token is padding."""

    def nobodys(self, task: Task, lengths: Ints, rng: np.random.Generator) -> Encoded:
        """Drawn records of those lengths."""

    def public(self, task: Task, sentences: Sequence[str], most: int) -> Encoded:
        """Public sentences of at most `most` tokens; of another medium as many drawn records."""


@dataclass(frozen=True, eq=False)
class TextInputs:
    """Tokens, of which the base has embeddings for `rows`.

    `typed`: it was trained with a kind of its own for the tokens of a pair's second text.
    """

    reader: Any
    rows: int
    typed: bool = False
    one_length: bool = False

    @classmethod
    def of(cls, base: Any, tokenizer: Any, headed: bool = True) -> TextInputs:
        """`headed`: its answers come of a head, above pairs that its tokenizer may tell apart."""
        kinds = getattr(base.config.get_text_config(), "type_vocab_size", 0)
        typed = headed and kinds > 1 and "token_type_ids" in tokenizer.model_input_names
        return cls(tokenizer, int(base.get_input_embeddings().num_embeddings), typed)

    @property
    def vocabulary(self) -> int:
        """Tokens that the tokenizer may give and the network can read."""
        return min(len(self.reader), self.rows)

    @property
    def pad(self) -> int:
        """The tokenizer's own, where it is embedded."""
        token = self.reader.pad_token_id
        return int(token) if token is not None and 0 <= token < self.rows else 0

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ids and where they are; which text they are of, if `typed`."""
        found = {"input_ids": ids, "attention_mask": (mask > 0).long()}
        return found | {"token_type_ids": (mask == 2).long()} if self.typed else found

    def longest(self, network: Any, most: int, where: str) -> int:
        """As configured; BadInput, at once, where a record of it could not be embedded."""
        positions = getattr(
            network.backbone.config.get_text_config(), "max_position_embeddings", None
        )
        if isinstance(positions, int) and 0 < positions < most:
            raise BadInput(
                f"[model] max_length = {most}: expected at most the base model's {positions}"
                " positions"
            )
        check_fit(self.reader, self.rows, where)
        return most

    def tried(self, device: torch.device, longest: int = TOKENS, seed: int = 0) -> Given:
        """Random words."""
        return texts(self.vocabulary, device, longest, seed)

    def nobodys(self, task: Task, lengths: Ints, rng: np.random.Generator) -> Encoded:
        """Random words."""
        words = [rng.integers(0, self.vocabulary, length) for length in lengths]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return task.unlabelled(np.concatenate(words).astype(np.int32), offsets)

    def public(self, task: Task, sentences: Sequence[str], most: int) -> Encoded:
        """As the task reads texts of nobody's; two to a record where it compares them."""
        paired = isinstance(task, TextTask) and task.apart
        given = zip(sentences, sentences[::-1], strict=True) if paired else sentences
        return task.encode(task.asked(list(given)), self.reader, most)


@dataclass(frozen=True, eq=False)
class ValueInputs:
    """Values under one name, all of one shape."""

    reader: Any
    name: str
    shape: tuple[int, ...]
    one_length: bool = True
    pad: int = 0

    @classmethod
    def of(cls, base: Any, reader: Any, medium: Medium, where: str) -> ValueInputs:
        """BadInput where the base reads something else, or its processor gives several shapes."""
        try:
            found = {medium.values(each, reader).shape for each in medium.blanks(reader)}
        except BadInput:
            raise
        except Exception as error:  # the library raises a dozen unrelated types
            raise BadInput(
                f"{where}: found a processor that reads no {medium.name} ({type(error).__name__})"
            ) from error
        if base.main_input_name != medium.given:
            raise BadInput(
                f"{where}: found a base that reads {base.main_input_name}, expected {medium.given},"
                f" as of each {medium.name}"
            )
        if len(found) > 1:
            shapes = " and ".join(sorted(map(str, found)))
            raise BadInput(f"{where}: found a processor that gives {shapes}, expected one shape")
        return cls(reader, medium.given, found.pop())

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The values alone: none is padding."""
        return {self.name: ids}

    def longest(self, network: Any, most: int, where: str) -> int:
        """The places of the base's hidden states, whatever is configured for texts: their cost."""
        config: Any = network.backbone.config
        ids, mask = self.tried(next(network.parameters()).device)
        try:
            with torch.no_grad():
                found = network.backbone(**self.read(ids, mask), output_hidden_states=True)
            shape = tuple(found.hidden_states[-1].shape)
        except Exception as error:  # the library raises a dozen unrelated types
            raise BadInput(
                f"{where}: found a {config.model_type} that can't read {self.name} of"
                f" {self.shape} ({type(error).__name__}), expected the processor's own base"
            ) from error
        if len(shape) != 3 or shape[0] != RECORDS:
            raise BadInput(
                f"{where}: found hidden states of {shape}, expected (records, places, width), as a"
                " transformer has them"
            )
        return int(shape[1])

    def tried(self, device: torch.device, longest: int = TOKENS, seed: int = 0) -> Given:
        """Random values."""
        values = self._drawn(RECORDS, np.random.default_rng(seed))
        mask = torch.ones((RECORDS, 1), dtype=torch.int64, device=device)
        return torch.from_numpy(values).to(device), mask

    def nobodys(self, task: Task, lengths: Ints, rng: np.random.Generator) -> Encoded:
        """Random values; the length of each record is what they say of the first."""
        return task.unlabelled(self._drawn(len(lengths), rng), np.array([0, lengths[0]]))

    def public(self, task: Task, sentences: Sequence[str], most: int) -> Encoded:
        """Random values: there is no public record of a medium."""
        lengths = np.full(len(sentences), most, dtype=np.int64)
        return self.nobodys(task, lengths, np.random.default_rng(0))

    def _drawn(self, count: int, rng: np.random.Generator) -> Any:
        return rng.normal(0, 1, (count, *self.shape)).astype(np.float32)


@dataclass(frozen=True)
class _Filled:
    """An extractor of sounds of any length: cut, or filled up with silence, to `samples`."""

    extractor: Any
    samples: int

    @property
    def sampling_rate(self) -> int:
        """Samples a second."""
        return int(self.extractor.sampling_rate)

    def save_pretrained(self, folder: Path) -> None:
        """The extractor's own files: how long sounds are, it does not say."""
        self.extractor.save_pretrained(folder)

    def __call__(self, sound: Any, **given: Any) -> Any:
        fixed = {"padding": "max_length", "truncation": True, "max_length": self.samples}
        return self.extractor(sound, **given, **fixed)


def load_reader(folder: Path, medium: Medium | None, most: int) -> Any:
    """A base's own tokenizer, or the processor of a medium; code in the folder is never run.

    Where a base reads sounds of any length, as Wav2Vec2, they are `most` of its places long, which
    are of 20 ms as a rule. BadInput where there is none, or what it needs is not installed.
    """
    if medium is None:
        return load_tokenizer(folder)
    library(medium.package, medium.extra)  # else transformers would say something else
    kind: Any = {
        "image": transformers.AutoImageProcessor,
        "audio": transformers.AutoFeatureExtractor,
    }[medium.name]
    # institutions' values must not depend on what else is installed
    chosen = {"backend": "pil"} if medium.name == "image" else {}
    try:
        reader = kind.from_pretrained(folder, trust_remote_code=False, **chosen)
        if medium.name != "audio":
            return reader
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        place = getattr(config, "inputs_to_logits_ratio", 0)  # samples of one
        return _Filled(reader, most * place) if place else reader
    except Exception as error:  # the library raises a dozen unrelated types
        line = next(iter(str(error).splitlines()), "")[:200]
        raise BadInput(
            f"[model] base = {folder}: found no processor of {medium.plural} that transformers"
            f" reads ({type(error).__name__}: {line}), expected the model's own"
        ) from error


def inputs_of(base: Any, reader: Any, task: Task, where: str, headed: bool = True) -> Inputs:
    """What a loaded base is given for a task; `headed` as `TextInputs.of` takes it."""
    if task.medium is None:
        return TextInputs.of(base, reader, headed)
    return ValueInputs.of(base, reader, task.medium, where)
