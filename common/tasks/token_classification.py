"""A tag to each word of a text: entities by type, in the BIO notation.

Words are cut into the tokenizer's pieces; the first piece of a word carries its tag, and nothing is
learnt from the others. A record's loss is a mean over its own words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from fedlora.common.data.encoding import text_frame, word_pieces
from fedlora.common.data.medium import Medium
from fedlora.common.data.records import Columns, Records
from fedlora.common.data.tagged import OUTSIDE, TAGS, WORDS, read_tag_set, words_of
from fedlora.common.data.values import a_text
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import IGNORED, Batch, Ints, Tokenised, Totals, rows_of
from fedlora.common.tasks.classification import precise
from fedlora.common.tasks.scores import f1_of, table_of
from fedlora.common.tasks.task import WORD, Named, as_inputs, refuse_empty
from fedlora.common.tasks.texts import text_columns

Entity = tuple[str, int, int]  # its type, its first word, and the one behind its last


@dataclass(frozen=True)
class TokenClassification:
    """Cross entropy of each word's tag. `labels` are the tags: "O", and "B-…" and "I-…" by type."""

    labels: tuple[str, ...]
    name: ClassVar[str] = "token-classification"
    reads: ClassVar[str] = WORD
    medium: ClassVar[Medium | None] = None

    @property
    def outputs(self) -> int:
        """Numbers that a head gives for each word: one for each tag."""
        return len(self.labels)

    @property
    def types(self) -> tuple[str, ...]:
        """Of entities, sorted."""
        return tuple(sorted({tag[2:] for tag in self.labels if tag != OUTSIDE}))

    @classmethod
    def columns(cls, named: Named) -> Columns:
        """Words and their tags, or a text and spans of its characters."""
        if not named.tags:
            raise BadInput(
                '[data] tags = "": expected a column of tags, or of spans, since task ='
                ' "token-classification"'
            )
        first, _ = text_columns(named)
        return Columns("" if named.tokens else first, tokens=named.tokens, tags=named.tags)

    @classmethod
    def label_set(cls, path: Path, named: Named) -> tuple[str, ...]:
        """As configured, or of the entities that occur in a public file."""
        return tuple(named.labels) or read_tag_set(path, named.tags)

    def encode(self, records: Records, tokenizer: Any, max_length: int) -> Tokenised:
        """Each record's words as pieces, framed as the tokenizer frames a text; `targets` are tags.

        BadInput where there are no tags, or a record has no word.
        """
        if not records.unanswered and TAGS not in records.parts:
            raise BadInput(f"{records.where}: found no tags, expected a column of them")
        frame = text_frame(tokenizer)
        room, cut = max(0, max_length - len(frame)), 0
        words = records.parts[WORDS]
        refuse_empty([len(each) for each in words], records)
        tags = records.parts.get(TAGS) or [[IGNORED + 1] * len(each) for each in words]
        rows, targets = [], []
        for pieces, own in zip(word_pieces(tokenizer, words), tags, strict=True):
            body = [piece for word in pieces for piece in word]
            marks = [t for word, tag in zip(pieces, own, strict=True) for t in _first(word, tag)]
            cut += len(body) > room
            rows.append(frame.around(body[:room]) or [int(tokenizer.pad_token_id or 0)])
            around = len(rows[-1]) - len(frame.after) - len(marks[:room]) - len(frame.before)
            targets += [IGNORED] * len(frame.before) + marks[:room]
            targets += [IGNORED] * (len(frame.after) + around)
        return rows_of(rows, np.array(targets, dtype=np.int64), {"text": cut}, by_token=True)

    def unlabelled(self, tokens: Any, offsets: Ints) -> Tokenised:
        """Texts of nobody's, each token a word with the first tag."""
        return Tokenised(tokens, offsets, np.zeros(len(tokens), dtype=np.int64), {}, by_token=True)

    def asked(self, inputs: Sequence[Any]) -> Records:
        """Texts, or lists of words; BadInput names the first that is neither."""
        words = []
        for number, each in enumerate(inputs, 1):
            listed = isinstance(each, list | tuple)
            own = [a_text(word, f"input {number}") for word in (each if listed else [each])]
            words.append(own if listed else words_of(own[0])[0])
        return as_inputs([" ".join(each) for each in words], {WORDS: words})

    def losses(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(n,) a mean over each record's words, of `outputs` (n, length, tags); 0 without words."""
        by_word = functional.cross_entropy(
            precise(outputs).transpose(1, 2), batch.targets, reduction="none", ignore_index=IGNORED
        )
        words = (batch.targets != IGNORED).sum(dim=1).clamp(min=1)
        return by_word.sum(dim=1) / words

    def measure(self, outputs: torch.Tensor, batch: Batch) -> Totals:
        """Of `outputs` (n, length, tags): by type, entities that are true, given and rightly given;
        words, right ones, loss, records.
        """
        places = {kind: place for place, kind in enumerate(self.types)}
        counts = {name: np.zeros(len(places)) for name in ("true", "given", "right")}
        words = right = 0
        for mine, theirs in self._tags(outputs, batch):
            true, given = (set(entities(tags)) for tags in (theirs, mine))
            words += len(mine)
            right += sum(a == b for a, b in zip(mine, theirs, strict=True))
            for name, found in (("true", true), ("given", given), ("right", true & given)):
                for kind, _, _ in found:
                    counts[name][places[kind]] += 1
        loss = self.losses(outputs, batch).double().sum()
        return counts | {
            "words": np.array(float(words)),
            "right_words": np.array(float(right)),
            "loss": np.array(loss.item()),
            "examples": np.array(float(len(outputs))),
        }

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Mean loss, F1 of entities whose type and borders are both right, and accuracy of words.

        Of the words that fit into `max_length`.
        """
        true, given, right = (float(totals[name].sum()) for name in ("true", "given", "right"))
        return {
            "loss": float(totals["loss"]) / float(totals["examples"]),
            "entity_f1": f1_of(true, given, right),
            "entity_precision": right / given if given else 0.0,
            "entity_recall": right / true if true else 0.0,
            "word_accuracy": float(totals["right_words"]) / max(float(totals["words"]), 1.0),
        }

    def details(self, totals: Totals) -> dict[str, Any]:
        """Precision, recall and F1 of each type of entity."""
        return {"by_label": table_of(self.types, totals)}

    def answers(self, outputs: torch.Tensor, batch: Batch) -> list[list[str]]:
        """The tag of each word that was read."""
        return [mine for mine, _ in self._tags(outputs, batch)]

    def _tags(self, outputs: torch.Tensor, batch: Batch) -> Iterator[tuple[list[str], list[str]]]:
        """The tags that are given to each record's words, and those that they have."""
        best, targets = outputs.argmax(dim=2).cpu().numpy(), batch.targets.cpu().numpy()
        for mine, theirs in zip(best, targets, strict=True):
            words = theirs != IGNORED
            true = np.where(theirs[words] < 0, 0, theirs[words])
            yield [self.labels[tag] for tag in mine[words]], [self.labels[tag] for tag in true]


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """What BIO tags say, as conlleval reads them: an "I-" that continues nothing begins one."""
    kind, begin = "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        goes_on = tag == f"I-{kind}" and kind
        if kind and not goes_on:
            yield kind, begin, place
        if not goes_on:
            kind, begin = ("" if tag == OUTSIDE else tag[2:]), place


def _first(word: list[int], tag: int) -> list[int]:
    """The targets of a word's pieces."""
    return [tag] + [IGNORED] * (len(word) - 1)
