"""A response to a prompt, by a base that reads the one and then writes the other.

A row holds both, and the batch's mask says where the second begins. So its shape follows from the
record's own length, as every other's does (`common.model.shapes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlora.common.data.encoding import text_frame, word_tokens
from fedlora.common.data.records import Columns, Records
from fedlora.common.errors import BadInput
from fedlora.common.tasks.batch import IGNORED, Ints, Tokenised, rows_of
from fedlora.common.tasks.causal_lm import LEARNT, CausalLanguageModel
from fedlora.common.tasks.task import TRANSLATION, Named, as_inputs, refuse_empty
from fedlora.common.tasks.texts import text_columns


@dataclass(frozen=True)
class SequenceToSequence(CausalLanguageModel):
    """Next-token cross entropy of the response, a mean for each record.

    What is too long loses its right; the response keeps at least half of `max_length`.
    """

    name: ClassVar[str] = "seq2seq"
    reads: ClassVar[str] = TRANSLATION

    @classmethod
    def columns(cls, named: Named) -> Columns:
        """Prompts and responses."""
        if not named.response:
            raise BadInput('[data] response = "": expected a column, since task = "seq2seq"')
        return Columns(named.prompt or text_columns(named)[0], response=named.response)

    def encode(self, records: Records, tokenizer: Any, max_length: int) -> Tokenised:
        """Each prompt as the tokenizer frames it, then the response and its end.

        BadInput where a response has no token. What is to be answered is its own response here.
        """
        frame = text_frame(tokenizer)
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        responses = records.texts if records.unanswered else records.responses
        if responses is None:
            raise BadInput(
                f"{records.where}: found no responses, expected prompt and response columns"
            )
        answers = word_tokens(tokenizer, responses)
        refuse_empty([len(ids) for ids in answers], records)
        rows, begins, targets, cut = [], [], list[int](), {"prompt": 0, "response": 0}
        for prompt, answer in zip(word_tokens(tokenizer, records.texts), answers, strict=True):
            kept = (answer + end)[: max(max_length - len(frame) - len(prompt), max_length // 2)]
            question = frame.around(prompt[: max(0, max_length - len(frame) - len(kept))])
            cut["prompt"] += len(question) < len(prompt) + len(frame)
            cut["response"] += len(kept) < len(answer + end)
            rows.append(question + kept)
            begins.append(len(question))
            targets += [IGNORED] * len(question) + [LEARNT] * len(kept)
        marks = np.array(targets, dtype=np.int64)
        return rows_of(rows, marks, cut, by_token=True, second=begins)

    def asked(self, inputs: Sequence[Any]) -> Records:
        """Texts."""
        return as_inputs(inputs)

    def unlabelled(self, tokens: Any, offsets: Ints) -> Tokenised:
        """Texts of nobody's, of which the second half is to be predicted."""
        begins = (np.diff(offsets) + 1) // 2
        places = np.arange(len(tokens)) - np.repeat(offsets[:-1], np.diff(offsets))
        learnt = places >= np.repeat(begins, np.diff(offsets))
        targets = np.where(learnt, LEARNT, IGNORED).astype(np.int64)
        return Tokenised(tokens, offsets, targets, {}, by_token=True, second=begins)


def source_tokens(tokenizer: Any, prompt: str, room: int) -> list[int]:
    """What a base reads of a prompt that it is to answer."""
    frame = text_frame(tokenizer)
    return frame.around(word_tokens(tokenizer, [prompt])[0][: max(0, room - len(frame))])
