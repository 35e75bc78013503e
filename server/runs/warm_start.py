"""Where a run starts: LoRA and the head as they were drawn, or as public records taught them.

Public records of the same task cost no privacy, however often they are gone through. What they
teach is all that private rounds need not: these find a base that has turned to the task already,
whose features a private head reads as they are. The start is a run's first state, so that nodes
take it as they take any other, and its test figure is what public records give by themselves: what
a federation has to beat. AdamW with warm-up and linear decay, as a central loop would.

A projection is fitted on what the base makes of public text, and must be of the base that the
rounds find. So LoRA learns first, below a head without one (`turned`); then the head alone, on the
projection (`started`).
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import get_linear_schedule_with_warmup as warm_and_decay

from fedlora.common.config.parts import NetworkRecipe
from fedlora.common.data.records import Ints
from fedlora.common.disk.files import write_atomically, write_text
from fedlora.common.errors import BadInput
from fedlora.common.model.compute import COMPUTE
from fedlora.common.model.features import length_batches, pooled_features
from fedlora.common.model.network import AdapterModel
from fedlora.common.model.projection import PROJECTION, check_directions
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.figures import learnt_before
from fedlora.common.tasks.batch import Batch, Encoded
from fedlora.server.rounds.loop import score_of
from fedlora.server.runs.public_data import Machine, PublicRecords, PublicSide

log = logging.getLogger(__name__)

# in a run's folder: what the start came to, and the start itself
PUBLIC_START, START_STATE = "public_start.json", "public_start.safetensors"
SAID = {"records", "epochs", "best_epoch", "validation"}
BATCH, RATE, LONGEST_GRADIENT = 32, 2e-3, 1.0
TOKENS = 2048  # that go through the network at once: a batch of longer records goes in parts


def forget_beginning(folder: Path) -> None:
    """Drop what a killed beginning left: fitted on what was public then, and may be private now."""
    for name in (PROJECTION, COMPUTE, PUBLIC_START, START_STATE):
        (folder / name).unlink(missing_ok=True)


def turned(
    recipe: NetworkRecipe, records: PublicRecords, folder: Path, machine: Machine
) -> AdapterState | None:
    """What public records make of the base before a projection is fitted on it: `build` takes it.

    None where nothing is learnt or projected. For a run that begins: one that goes on has its
    projection, and its state in the checkpoint. BadInput where there is nothing to learn from.
    """
    if not recipe.model.projection or not recipe.public_epochs:
        return None
    plain = replace(recipe, model=replace(recipe.model, projection=0, kernel_directions=0))
    public = PublicSide.build(plain, records, folder, machine)
    rows = public.learnt_rows
    width = pooled_features(public.model, public.learnt, rows[:1]).shape[-1]
    check_directions(recipe.model.projection, min(len(rows), width))  # not after all its learning
    return _best(public)[0]


def started(public: PublicSide, folder: Path) -> tuple[AdapterState, float | None]:
    """The state that a run in `folder` starts from, and its score where there are public epochs.

    Of all epochs the best, as rounds are judged, and of equals the one that loses least; that of no
    epoch is among them. What it came to is written to public_start.json. BadInput where there is
    nothing to learn from.
    """
    if not public.recipe.public_epochs:
        return public.initial, None
    best, chosen, found = _best(public)
    write_atomically(folder / START_STATE, best.to_bytes())
    said = {
        "records": len(public.learnt_rows),
        "epochs": public.recipe.public_epochs,
        "best_epoch": chosen,
        "below_projection": public.initial.moves_base,
        "state": best.digest,
        "validation": found,
    }
    write_text(folder / PUBLIC_START, json.dumps(said, indent=2) + "\n")
    return best, score_of(found)


def kept_start(folder: Path, epochs: int) -> dict[str, Any] | None:
    """What public_start.json says of a run of so many public epochs; None for a run of none.

    BadInput where it is gone or says something else: the statement must not lose a sentence by it.
    """
    if not epochs:
        return None
    path = folder / PUBLIC_START
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: found no readable table, expected what the start gave") from error
    if not isinstance(found, dict) or not found.keys() >= SAID:
        raise BadInput(f"{path}: expected a table that has {', '.join(sorted(SAID))}")
    return found


def scored_start(
    public: PublicSide, folder: Path
) -> tuple[dict[str, Any] | None, AdapterState | None]:
    """`kept_start` with its figures on the test file, and the state; for when all rounds are over.

    What earlier versions kept of a start has these figures, and no state. A state that is gone or
    damaged costs its figures, and not what the rounds gave.
    """
    found, path = kept_start(folder, public.recipe.public_epochs), folder / START_STATE
    if found is None or "state" not in found:
        return found, None
    try:
        start = AdapterState.from_bytes(path.read_bytes(), public.model.spec, str(path))
    except (OSError, BadInput) as error:
        log.warning("%s: what the start reads on the test file stays unknown (%s)", path, error)
        return found, None
    if start.digest != found["state"]:
        log.warning("%s: found another state than the run began with; it is not scored", path)
        return found, None
    return {**found, "test": public.test.evaluate(start)}, start


def records_learnt(start: Mapping[str, Any] | None) -> int:
    """How many public records a run's first state was made of, by what `kept_start` says."""
    if start is None or not (start["best_epoch"] or start.get("below_projection")):
        return 0
    return int(start["records"])


def taught(folder: Path, epochs: int) -> tuple[str, ...]:
    """A sentence for the privacy statement, where a run in `folder` starts from public records."""
    return learnt_before(records_learnt(kept_start(folder, epochs)))


def _best(public: PublicSide) -> tuple[AdapterState, int, dict[str, float]]:
    """The best state of all epochs, the number of its epoch, and what it reads on validation."""
    epochs = public.recipe.public_epochs
    if not len(public.learnt_rows):
        raise BadInput(
            "[training] public_epochs: found no public record to learn from, expected some whose"
            " words are not in the test or validation part"
        )
    head_only = public.model.projection is not None
    score = partial(public.validation.evaluate, head_only=head_only)
    learnt = (_head_learnt if head_only else _learnt)(public, epochs)
    best, chosen, found = public.initial, 0, score(public.initial)
    for number, state in enumerate(learnt, 1):
        reached = score(state)
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
    """The state after each epoch over the public records."""
    model, data, rows = public.model, public.learnt, public.learnt_rows

    def add_gradient(part: Ints) -> None:
        _add_gradient(model, data, rows[part])

    return _stepped(public, epochs, model.parameters.values(), add_gradient)


def _head_learnt(public: PublicSide, epochs: int) -> Iterator[AdapterState]:
    """Likewise, where the head alone learns, on features that stand still."""
    model, data, rows = public.model, public.learnt, public.learnt_rows
    features = public.features.get("learnt", data, rows, public.initial)

    def add_gradient(part: Ints) -> None:
        targets = torch.from_numpy(data.targets[rows[part]]).to(features.device)
        outputs = model.head(features[torch.from_numpy(part)])
        losses = model.task.losses(outputs, Batch(targets, targets, targets))
        _backward(losses.sum() / len(part))

    return _stepped(public, epochs, model.head.parameters(), add_gradient)


def _stepped(
    public: PublicSide,
    epochs: int,
    parameters: Iterable[torch.nn.Parameter],
    add_gradient: Callable[[Ints], None],
) -> Iterator[AdapterState]:
    """The state after each epoch; `add_gradient` is given places in the public rows, by batch.

    Their order is drawn by the seed.
    """
    public.model.load(public.initial)
    trained, records = list(parameters), len(public.learnt_rows)
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    steps = epochs * math.ceil(records / BATCH)
    schedule = warm_and_decay(optimizer, steps // 10, steps)  # type: ignore[no-untyped-call]
    draw = np.random.Generator(np.random.Philox(public.recipe.seed))
    for _ in range(epochs):
        order = draw.permutation(records)
        for start in range(0, records, BATCH):
            add_gradient(order[start : start + BATCH])
            length = torch.nn.utils.clip_grad_norm_(trained, LONGEST_GRADIENT)
            if not torch.isfinite(length):  # one record that overflows must not end all
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield public.model.state()


def _add_gradient(model: AdapterModel, data: Encoded, rows: Ints) -> None:
    """Of the mean loss of `rows`, in parts that fit where a step of long records would not."""
    for part in length_batches(data.lengths[rows], TOKENS):
        batch = data.batch(rows[np.sort(part)], model.pad, model.device)
        _backward(model.losses(batch).sum() / len(rows))


def _backward(loss: torch.Tensor) -> None:
    with warnings.catch_warnings():  # of Opacus' hooks, which are off here
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        torch.autograd.backward(loss)
