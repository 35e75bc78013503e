"""A configuration from a TOML file: its fields, and what is right alone and wrong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from fedlora.common.config.schema import FLEXLORA, ROBUST, Config, FaultsConfig
from fedlora.common.config.task_names import BUILT_IN, BY_WORD, CLASSIFIED, LANGUAGES, MEDIA
from fedlora.common.config.toml import AUTO, UNDECIDED, read_fields, read_table, shown
from fedlora.common.disk.files import read_bytes, text_of
from fedlora.common.errors import BadInput
from fedlora.common.secagg.cohort import most_colluders
from fedlora.common.secagg.wire import MOST_MEMBERS

MAX_CONFIG_BYTES = 1 << 20
POOLED = 'expected 0 with pooling = "default", or pooling = "mean" or "layers"'


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file; `overrides` are `section.key=VALUE` in TOML. BadInput lists all faults."""
    data = read_bytes(path, MAX_CONFIG_BYTES, "a TOML file")
    return parse_config(text_of(data, path.name, "TOML", "utf-8-sig"), path.name, overrides)


def parse_config(text: str, where: str = "config", overrides: Sequence[str] = ()) -> Config:
    """The configuration that `text` describes; BadInput lists every fault."""
    _check_size(len(text), where)  # letters never outnumber bytes
    table = read_table(text, where, overrides)
    config, faults = read_fields(Config, table)
    together = [
        f"{where} {fault}"
        for paths, fault in _together(config)
        if not any(p in faults for p in paths)
    ]
    if faults or together:
        raise BadInput([*faults.values(), *together])
    return cast(Config, config)


def _check_size(size: int, where: str) -> None:
    if size > MAX_CONFIG_BYTES:
        raise BadInput(f"{where}: found more than {MAX_CONFIG_BYTES} bytes, expected at most 1 MiB")


Fault = tuple[tuple[str, ...], str]  # the fields that it is about, and the line to print


def _together(config: Config) -> Iterator[Fault]:
    """Faults of fields that are right alone and wrong together."""
    federation = config.federation
    if config.aggregation.secure:
        yield from _secure(config)
    elif config.faults != FaultsConfig():
        yield ("aggregation.secure",), "[faults]: expected none without [aggregation] secure = true"
    yield from _shared_noise(config)
    yield from _evaluation(config)
    if config.aggregation.strategy in ROBUST:
        yield from _robust(config)
    if config.aggregation.strategy == FLEXLORA:
        yield from _flexlora(config)
    if federation.partition == "by-column" and not federation.column:
        paths = ("federation.partition", "federation.column")
        yield paths, '[federation] column = "": expected a column, since partition = "by-column"'
    yield from _phases(config)
    if config.model.head_hidden > 0 and config.model.pooling == "default":
        paths = ("model.head_hidden", "model.pooling")
        found = f"[model] head_hidden = {config.model.head_hidden}"
        yield paths, f"{found}: {POOLED}"
    yield from _projected(config)
    if config.model.pooled_layers and config.model.pooling in ("default", "mean"):
        paths = ("model.pooled_layers", "model.pooling")
        found = f'[model] pooled_layers: expected [] with pooling = "{config.model.pooling}"'
        yield paths, f'{found}, or "layers"'
    if len(config.data.text) > 2:
        found = f"[data] text = {shown([*config.data.text])}"
        yield ("data.text",), f"{found}: expected one column, or the two of a pair"
    if len(config.data.labels) == 1:
        yield (
            ("data.labels",),
            f"[data] labels = {shown([*config.data.labels])}: expected [] or at least two",
        )
    yield from _pooled(config)
    yield from _media(config)
    if config.model.task in LANGUAGES:
        yield from _causal(config)


def _projected(config: Config) -> Iterator[Fault]:
    """A projection is of pooled features; what follows it needs one."""
    if config.model.projection > 0 and config.model.pooling == "default":
        found = f"[model] projection = {config.model.projection}"
        yield ("model.projection", "model.pooling"), f"{found}: {POOLED}"
    if config.model.kernel_directions > 0 and not config.model.projection:
        found = f"[model] kernel_directions = {config.model.kernel_directions}"
        paths = ("model.kernel_directions", "model.projection")
        yield paths, f"{found}: expected 0 with projection = 0"


def _phases(config: Config) -> Iterator[Fault]:
    """What the rounds can't be divided into: the head alone, then LoRA or both."""
    federation, training = config.federation, config.training
    if training.head_rounds > federation.rounds > UNDECIDED:
        paths = ("training.head_rounds", "federation.rounds")
        found = f"[training] head_rounds = {training.head_rounds}"
        yield paths, f"{found}: expected at most [federation] rounds = {federation.rounds}"
    if training.moves == "lora" and training.head_rounds == 0:
        found = '[training] moves = "lora": expected "both" with head_rounds = 0'
        paths = ("training.moves", "training.head_rounds")
        yield paths, f"{found}: a head that was never trained passes no gradient on"
    if training.moves == "lora" and config.privacy.head_clip > 0:
        found = f"[privacy] head_clip = {config.privacy.head_clip:g}"
        paths = ("training.moves", "privacy.head_clip")
        yield paths, f'{found}: expected 0 with moves = "lora"'


def _secure(config: Config) -> Iterator[Fault]:
    """What secure aggregation can't be combined with, and why."""
    federation, asked = config.federation, config.aggregation
    if federation.wire != "float32":
        found = f'[federation] wire = "{federation.wire}"'
        reason = 'expected "float32" under masks, which have words of their own'
        yield ("aggregation.secure", "federation.wire"), f"{found}: {reason}"
    members = federation.participation * federation.clients
    paths = ("aggregation.secure", "federation.clients", "federation.participation")
    if members < asked.minimum_cohort:
        found = f"[aggregation] minimum_cohort = {asked.minimum_cohort}"
        yield (
            (*paths, "aggregation.minimum_cohort"),
            f"{found}: expected at most the {members:g} institutions of a round",
        )
        return
    if federation.clients > MOST_MEMBERS:  # all of them may be drawn for a round
        found = f"[federation] clients = {federation.clients}"
        yield paths, f"{found}: expected at most {MOST_MEMBERS}: every pair shares a mask"
        return
    bear = {n: most_colluders(n) for n in range(asked.minimum_cohort, federation.clients + 1)}
    # not the smallest alone: t has steps
    weak = [str(n) for n, most in bear.items() if most < asked.max_colluders]
    if weak:
        found = f"[aggregation] max_colluders = {asked.max_colluders}"
        sizes = ", ".join(weak[:4]) + ", …" * (len(weak) > 4)
        yield (
            (*paths, "aggregation.max_colluders", "aggregation.minimum_cohort"),
            (
                f"{found}: expected at most {min(bear.values())}: nodes would refuse a cohort of"
                f" {sizes}"
            ),
        )
    if federation.participation < 1 and asked.epoch_rounds > 1:
        found = f"[aggregation] epoch_rounds = {asked.epoch_rounds}"
        yield (
            (*paths, "aggregation.epoch_rounds"),
            f"{found}: expected 1 with participation < 1: an epoch's cohort is fixed ahead",
        )


def _robust(config: Config) -> Iterator[Fault]:
    """What a mean that compares single updates can't be combined with, and why."""
    asked, dealing = config.aggregation, config.federation
    found = f'[aggregation] strategy = "{asked.strategy}"'
    if asked.secure:
        yield (
            ("aggregation.strategy", "aggregation.secure"),
            f"{found}: expected secure = false: it compares updates, and masks leave but a sum",
        )
    members = dealing.participation * dealing.clients
    if members < asked.fewest:
        yield (
            ("aggregation.strategy", "aggregation.hostile", "federation.clients"),
            f"{found} with hostile = {asked.hostile}: expected at least {asked.fewest} institutions"
            f" in a round, found {members:g}",
        )


def _flexlora(config: Config) -> Iterator[Fault]:
    """What a mean of products can't be combined with: it needs each, and changes their basis."""
    found, server = f'[aggregation] strategy = "{FLEXLORA}"', config.server
    remembers = "A and B have another basis after each round"
    expected: tuple[tuple[str, object, bool, str], ...] = (
        ("aggregation.secure", False, config.aggregation.secure, "masks leave but a sum"),
        ("lora.variant", "lora", config.lora.variant != "lora", "the mean of one half is exact"),
        ("server.optimizer", "none", server.optimizer not in ("none", AUTO), remembers),
        ("server.learning_rate", 1, server.learning_rate not in (1, UNDECIDED), remembers),
        ("server.warmup", 0, server.warmup > 0, remembers),
        ("server.decay", "none", server.decay == "linear", remembers),
        ("server.average_last", 0, server.average_last > 0, remembers),
        (
            "training.carry_optimizer",
            False,
            config.training.carry_optimizer and config.training.optimizer == "adamw",
            remembers,
        ),
    )
    for path, value, wrong, reason in expected:
        if wrong:
            section, field = path.split(".")
            yield (
                ("aggregation.strategy", path),
                f"{found}: expected [{section}] {field} = {shown(value)}: {reason}",
            )


def _under_masks(config: Config, asked: str, path: str) -> Iterator[Fault]:
    """What noise that is shared between institutions can't be combined with, and why."""
    if not config.aggregation.secure:
        yield (
            (path, "aggregation.secure"),
            (
                f"[privacy] {asked}: expected [aggregation] secure = true: a single update has but"
                " a share of the noise"
            ),
        )
    if config.privacy.head_clip > 0:
        found = f"[privacy] head_clip = {config.privacy.head_clip:g}"
        yield (path, "privacy.head_clip"), f"{found}: expected 0 with {asked}: one clip for all"


def _shared_noise(config: Config) -> Iterator[Fault]:
    """What shared noise needs: masks; and for records, rounds of one step of SGD."""
    if config.privacy.mode == "client":
        yield from _under_masks(config, 'mode = "client"', "privacy.mode")
    if config.privacy.noise == "own":
        return
    asked, path = 'noise = "shared"', "privacy.noise"
    if config.privacy.mode != "record":
        found = f'[privacy] mode = "{config.privacy.mode}"'
        yield (path, "privacy.mode"), f'{found}: expected "record" with {asked}'
        return
    yield from _under_masks(config, asked, path)
    if config.model.head_hidden > 0:
        found = f"[model] head_hidden = {config.model.head_hidden}: expected 0 with {asked}"
        reason = "what its products round follows from which units are drawn"
        yield (path, "model.head_hidden"), f"{found}: {reason}"
    training = config.training
    phases = ("", "head_") if training.head_rounds else ("",)
    for prefix in phases:
        steps, optimizer = (getattr(training, prefix + name) for name in ("steps", "optimizer"))
        if steps > 1:
            found = f"[training] {prefix}steps = {steps}: expected 1 with {asked}"
            reason = "a second step would depend on units before any noise covers them"
            yield (path, f"training.{prefix}steps"), f"{found}: {reason}"
        if optimizer not in ("sgd", AUTO):
            found = f'[training] {prefix}optimizer = "{optimizer}": expected "sgd" with {asked}'
            reason = "at the node it would divide by what has no noise; [server] may"
            yield (path, f"training.{prefix}optimizer"), f"{found}: {reason}"


def _evaluation(config: Config) -> Iterator[Fault]:
    """Counts are of whole noise at each institution; of classes, where a record has one."""
    asked, model, privacy = config.evaluation, config.model, config.privacy
    if not asked.hold_out:
        return
    found = f"[evaluation] hold_out = {asked.hold_out:g}"
    if privacy.mode == "client" or privacy.noise == "shared":
        reason = "counts have each institution's own noise"
        paths = ("evaluation.hold_out", "privacy.mode", "privacy.noise")
        yield paths, f'{found}: expected 0 with mode = "client" or noise = "shared": {reason}'
    if bool(asked.group and asked.groups) != ("groups" in asked.counts):
        paths = ("evaluation.counts", "evaluation.group", "evaluation.groups")
        yield (
            paths,
            f"[evaluation] counts = {shown([*asked.counts])}: expected group, groups and"
            ' "groups" all together or none of them',
        )
    of_classes = [each for each in asked.counts if each != "loss"]
    if of_classes and model.task not in CLASSIFIED:
        shown_counts = shown([*asked.counts])
        yield (
            ("evaluation.counts", "model.task"),
            f'[evaluation] counts = {shown_counts}: expected ["loss"] with task = "{model.task}",'
            " whose records have no one class",
        )


def _media(config: Config) -> Iterator[Fault]:
    """Records that are no text have a column of their own, which no other task reads."""
    task = config.model.task
    for reads, medium in MEDIA.items():
        column, since = getattr(config.data, medium), f'since task = "{task}"'
        paths = (f"data.{medium}", "model.task")
        if task == reads and not column:
            yield paths, f'[data] {medium} = "": expected a column of bytes or of paths, {since}'
        elif column and task != reads and task in BUILT_IN:
            yield paths, f'[data] {medium} = {shown(column)}: expected "", {since}'


def _pooled(config: Config) -> Iterator[Fault]:
    """A task that answers words has a head that reads words, and no other task has."""
    model, by_word = config.model, config.model.task in BY_WORD
    since = f'since task = "{model.task}"'
    if by_word and model.pooling not in (AUTO, "words"):
        found = f'[model] pooling = "{model.pooling}"'
        yield ("model.task", "model.pooling"), f'{found}: expected "words", {since}'
    elif model.pooling == "words" and model.task in BUILT_IN and not by_word:
        found = '[model] pooling = "words": expected default, mean or layers'
        yield ("model.task", "model.pooling"), f"{found}, {since}"
    if model.pooling == "pairs" and model.task in BUILT_IN and len(config.data.text) < 2:
        found = '[model] pooling = "pairs": expected two columns in [data] text, found'
        yield ("model.pooling", "data.text"), f"{found} {shown([*config.data.text])}"
    if model.pooling == "words" and model.projection > 0:
        found = f"[model] projection = {model.projection}"
        yield ("model.projection", "model.pooling"), f'{found}: expected 0 with pooling = "words"'


def _causal(config: Config) -> Iterator[Fault]:
    """A language model has no pooling, no labels and no head of its own."""
    since = f'since task = "{config.model.task}"'
    if config.model.pooling in ("mean", "layers", "pairs"):
        found = f'[model] pooling = "{config.model.pooling}"'
        yield ("model.task", "model.pooling"), f'{found}: expected "default", {since}'
    if config.training.head_rounds > 0:
        found = f"[training] head_rounds = {config.training.head_rounds}"
        yield ("model.task", "training.head_rounds"), f"{found}: expected 0, {since}"
    if config.privacy.head_clip > 0:
        found = f"[privacy] head_clip = {config.privacy.head_clip:g}"
        yield ("model.task", "privacy.head_clip"), f"{found}: expected 0, {since}"
