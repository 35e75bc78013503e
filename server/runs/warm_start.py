"""Where a run starts: LoRA and the head as they were drawn, or as public records taught them.

Public records of the same task cost no privacy, however often they are gone through. What they
teach is all that private rounds need not: these find a base that has turned to the task already,
whose features a private head reads as they are. The start is a run's first state, so that nodes
take it as they take any other, and its test figure is what public records give by themselves: what
a federation has to beat. AdamW with warm-up and linear decay, as a central loop would.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import get_linear_schedule_with_warmup as warm_and_decay

from fedlora.common.config.parts import NetworkRecipe
from fedlora.common.data.records import Ints
from fedlora.common.disk.files import write_atomically, write_text
from fedlora.common.errors import BadInput
from fedlora.common.model.features import length_batches
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.projection import PROJECTION
from fedlora.common.model.state import AdapterState
from fedlora.common.tasks.batch import Encoded
from fedlora.server.rounds.loop import score_of
from fedlora.server.runs.public_data import Machine, PublicRecords, PublicSide

log = logging.getLogger(__name__)

# in a run's folder: what the start came to, and the start itself
PUBLIC_START, START_STATE = "public_start.json", "public_start.safetensors"
BATCH, RATE, LONGEST_GRADIENT = 32, 2e-3, 1.0
TOKENS = 2048  # that go through the network at once: a batch of longer records goes in parts
TAUGHT = (
    "Before the first round the adapter learnt from {records} public records, which no ε covers."
)


def turned(
    recipe: NetworkRecipe, records: PublicRecords, folder: Path, machine: Machine
) -> AdapterState | None:
    """What public records make of the base before a projection is fitted on it: `build` takes it.

    None where nothing is learnt or projected, and where a run goes on: the projection lies in its
    folder, and its state in the checkpoint. BadInput where there is nothing to learn from.
    """
    fitted = (folder / PROJECTION).is_file()
    if fitted or not recipe.model.projection or not recipe.public_epochs:
        return None
    plain = replace(recipe, model=replace(recipe.model, projection=0, kernel_directions=0))
    return _best(PublicSide.build(plain, records, folder, machine))[0]


def started(public: PublicSide, folder: Path) -> tuple[AdapterState, float | None]:
    """The state that a run in `folder` starts from, and its score where there are public epochs.

    Of all epochs the best, as rounds are judged, and of equals the one that loses least; that of no
    epoch is among them. What it came to is written to public_start.json. BadInput where there is
    nothing to learn from.
    """
    (folder / PUBLIC_START).unlink(missing_ok=True)
    if not public.recipe.public_epochs:
        return public.initial, None
    best, chosen, found = _best(public)
    write_atomically(folder / START_STATE, best.to_bytes())
    said = {
        "records": len(public.learnt_rows),
        "epochs": public.recipe.public_epochs,
        "best_epoch": chosen,
        "below_projection": public.initial.moves_base,
        "validation": found,
    }
    write_text(folder / PUBLIC_START, json.dumps(said, indent=2) + "\n")
    return best, score_of(found)


def kept_start(folder: Path) -> dict[str, Any] | None:
    """What public_start.json says; None where a run starts as it was drawn."""
    path = folder / PUBLIC_START
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def scored_start(public: PublicSide, folder: Path) -> dict[str, Any] | None:
    """`kept_start`, and its figures on the test file, which is scored when all rounds are over."""
    found, path = kept_start(folder), folder / START_STATE
    if found is None or not path.exists():  # earlier versions scored it before the first round
        return found
    start = AdapterState.from_bytes(path.read_bytes(), public.model.spec, str(path))
    return {**found, "test": public.test.evaluate(start)}


def taught(folder: Path) -> tuple[str, ...]:
    """A sentence for the privacy statement, where a run in `folder` starts from public records."""
    found = kept_start(folder)
    if found is None or not (found["best_epoch"] or found.get("below_projection")):
        return ()
    return (TAUGHT.format(records=found["records"]),)


def _best(public: PublicSide) -> tuple[AdapterState, int, dict[str, float]]:
    """The best state of all epochs, the number of its epoch, and what it reads on validation."""
    epochs = public.recipe.public_epochs
    if not len(public.learnt_rows):
        raise BadInput(
            "[training] public_epochs: found no public record to learn from, expected some whose"
            " words are not in the test or validation part"
        )
    best, chosen, found = public.initial, 0, public.validation.evaluate(public.initial)
    for number, state in enumerate(_learnt(public, epochs), 1):
        reached = public.validation.evaluate(state)
        log.info("public records, epoch %d of %d: %s", number, epochs, reached)
        if _rank(reached) > _rank(found):
            best, chosen, found = state, number, reached
    return best, chosen, found


def _rank(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Higher is better. What has no finite loss ranks last: it may still guess a label well."""
    score, loss = score_of(metrics), metrics["loss"]
    if score is None or not math.isfinite(loss):
        return -math.inf, 0.0
    return score, -loss


def _learnt(public: PublicSide, epochs: int) -> Iterator[AdapterState]:
    """The state after each epoch over the public records; their order is drawn by the seed.

    On a projection the head alone learns: it was fitted on what lies below.
    """
    model, data, rows = public.model, public.learnt, public.learnt_rows
    model.load(public.initial)
    whole = model.projection is None
    trained = list(model.parameters.values() if whole else model.head.parameters())
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    steps = epochs * math.ceil(len(rows) / BATCH)
    schedule = warm_and_decay(optimizer, steps // 10, steps)  # type: ignore[no-untyped-call]
    draw = np.random.Generator(np.random.Philox(public.recipe.seed))
    for _ in range(epochs):
        order = draw.permutation(rows)
        for start in range(0, len(order), BATCH):
            _add_gradient(model, data, order[start : start + BATCH], trained)
            length = torch.nn.utils.clip_grad_norm_(trained, LONGEST_GRADIENT)
            if not torch.isfinite(length):  # one record that overflows must not end all
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield model.state()


def _add_gradient(
    model: AdapterModel, data: Encoded, rows: Ints, trained: Sequence[torch.nn.Parameter]
) -> None:
    """Of the mean loss of `rows`, in parts that fit where a step of long records would not."""
    for part in length_batches(data.lengths[rows], TOKENS):
        batch = data.batch(rows[np.sort(part)], model.pad, model.device)
        with warnings.catch_warnings():  # of Opacus' hooks, which are off here
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(model.losses(batch).sum() / len(rows), inputs=trained)
