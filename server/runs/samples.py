"""What a language model answers to the first public prompts, beside what stands there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedlora.common.model.network import AdapterModel
from fedlora.common.tasks.batch import Encoded, Tokenised
from fedlora.common.tasks.causal_lm import LEARNT

COUNT, LONGEST = 16, 48  # records, and tokens of an answer
SHOWN = 5  # of them, to a person


def samples(model: AdapterModel, data: Encoded) -> Iterator[dict[str, str]]:
    """Prompt, expected and answer of `COUNT` records, under the state that `model` holds.

    The first answer of each record; of a text that is learnt as a whole, its second half.
    """
    if not isinstance(data, Tokenised):
        return
    for row in range(min(COUNT, len(data))):
        ids = data.tokens_of(row).tolist()
        learnt = data.targets[data.offsets[row] : data.offsets[row + 1]] == LEARNT
        begin = int(np.argmax(learnt))
        if begin <= 1:
            begin = len(ids) // 2
        end = begin + int(np.argmin([*learnt[begin:], False]))
        prompt, expected = ids[:begin], ids[begin:end][:LONGEST]
        answer = model.continued(prompt or [model.pad], LONGEST)
        parts = {"prompt": prompt, "expected": expected, "answer": answer}
        yield {
            name: str(model.tokenizer.decode(part, skip_special_tokens=True))
            for name, part in parts.items()
        }


def likeness(found: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """How like what stands there the answers are, 0 to 100: chrF (Popović 2015) and BLEU (Papineni
    et al. 2002), each of all answers together, as sacrebleu counts them (Post 2018).

    Nothing without the extra `generation`, or without an answer to compare with.
    """
    compared = [(each["answer"], each["expected"]) for each in found if each["expected"].strip()]
    if not compared or importlib.util.find_spec("sacrebleu") is None:
        return {}
    from sacrebleu import corpus_bleu, corpus_chrf

    answers, expected = zip(*compared, strict=True)
    return {
        name: float(of(list(answers), [list(expected)]).score)
        for name, of in (("chrf", corpus_chrf), ("bleu", corpus_bleu))
    }
