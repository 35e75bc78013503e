"""A run's configuration: frozen dataclasses from TOML, every fault reported at once.

Each field says beside its default what it may be. Fields marked `tuning` change speed and memory
only; all others can change what is guaranteed or learnt, and most of them enter the signed
manifest. Sections, keys and names that are not known are refused with a suggestion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from fedlora.common.codec.strict import NOUNS
from fedlora.common.config.toml import (
    Bounds,
    Choice,
    Each,
    Pattern,
    read_fields,
    read_table,
    shown,
    to_toml,
)
from fedlora.common.errors import BadInput
from fedlora.common.secagg.cohort import most_colluders
from fedlora.common.secagg.wire import MOST_MEMBERS

MAX_CONFIG_BYTES = 1 << 20
DIGEST = Pattern(r"(sha256:[0-9a-f]{64})?", '"sha256:" and 64 hexadecimal digits, or ""')
LETTER = r"[^\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]"  # one line, and writable as UTF-8
NAME = Pattern(LETTER + "{1,4096}", "one line of text")
OPTIONAL = Pattern(LETTER + "{0,4096}", 'one line of text, or ""')
LAYER = Bounds(0, 10_000)
AUTO, ALL_LINEAR = "auto", "all-linear"  # of [lora] targets
ATTACKS = ("sybil", "small-u2", "two-lists", "corrupt-share")
POOLED = 'expected 0 with pooling = "default", or pooling = "mean" or "layers"'


def _number(
    default: float | str,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
    tuning: bool = False,
) -> Any:
    return field(
        default=default, metadata={"rule": Bounds(low, high, open_low, open_high), "tuning": tuning}
    )


def _choice(default: str, *known: str, tuning: bool = False) -> Any:
    return field(default=default, metadata={"rule": Choice(known), "tuning": tuning})


def _text(default: str, rule: Pattern = OPTIONAL) -> Any:
    return field(default=default, metadata={"rule": rule})


def _items(
    default: tuple[Any, ...], rule: Bounds | Pattern, shortest: int = 0, one: bool = False
) -> Any:
    return field(default=default, metadata={"rule": Each(rule, shortest), "one": one})


@dataclass(frozen=True)
class ModelConfig:
    # a directory, the name of an installed model package, or a hub id
    base: str = _text("minilm", NAME)
    digest: str = _text("", DIGEST)  # "sha256:…": what the base must be
    task: str = _choice("sequence-classification", "sequence-classification", "causal-lm")
    max_length: int = _number(64, 4, 32_768)
    pooling: str = _choice("default", "default", "mean", "layers")
    # for "layers": 0 is the embeddings; empty: all
    pooled_layers: tuple[int, ...] = _items((), LAYER)
    # principal directions of public features to whiten; 0: none
    projection: int = _number(0, 0, 16_384)
    projection_ridge: float = _number(1.0, 0, 1e6)
    kernel_directions: int = _number(0, 0, 16_384)  # similarities to public texts, on top; 0: none
    kernel_gamma: float = _number(6.0, 0, 1e4, open_low=True)
    head_hidden: int = _number(0, 0, 16_384)  # hidden width of our own head; 0: linear
    head_scale: float = _number(10.0, 0, 1e6, open_low=True)  # pooled features are multiplied by it


@dataclass(frozen=True)
class LoraConfig:
    rank: int = _number(8, 1, 1024)
    alpha: float = _number(16.0, 0, 1e6, open_low=True)
    # "auto", "all-linear", a regular expression (an `re:` before it makes one of a plain word), or
    # names of layers
    targets: tuple[str, ...] = _items(("query", "value"), NAME, shortest=1, one=True)
    layers: tuple[int, ...] = _items((), LAYER)  # empty: all
    variant: str = _choice("lora", "lora", "ffa")


@dataclass(frozen=True)
class DataConfig:
    train: str = _text("")
    test: str = _text("")  # public
    # A public file, or the share of train that belongs to no client.
    validation: float | str = _number(0.03, 0, 1, open_low=True, open_high=True)
    text: str = _text("text", NAME)
    prompt: str = _text("")
    response: str = _text("")
    label: str = _text("label", NAME)
    # public label set; empty: taken from test, never from train
    labels: tuple[str, ...] = _items((), NAME)
    unit: str = _text("")  # the column that names the privacy unit; empty: the record


@dataclass(frozen=True)
class FederationConfig:
    clients: int = _number(10, 1, 1_000_000)
    partition: str = _choice("dirichlet", "iid", "dirichlet", "by-column", "shards", "quantity")
    alpha: float = _number(0.5, 0, 1e6, open_low=True)
    column: str = _text("")  # by-column
    rounds: int = _number(20, 1, 100_000)
    # attempts beyond rounds that the noise is calibrated for
    spare_rounds: int = _number(0, 0, 100_000)
    participation: float = _number(1.0, 0, 1, open_low=True)
    quorum: float = _number(1.0, 0, 1, open_low=True)
    deadline: float = _number(600.0, 0, 1e6, open_low=True)  # seconds
    patience: int = _number(0, 0, 100_000)  # early stopping on validation, in evaluations; 0: off
    evaluate_every: int = _number(1, 1, 100_000)  # rounds between looks at validation


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = _number(2, 1, 10_000)
    sampling_rate: float = _number(0.02, 0, 1, open_low=True)
    expected_units: float = _number(128.0, 0, 1e9, open_low=True)
    optimizer: str = _choice("adamw", "sgd", "adamw")
    carry_optimizer: bool = True
    learning_rate: float = _number(1e-3, 0, 1e3, open_low=True)
    proximal_mu: float = _number(0.0, 0, 1e3)
    head_rounds: int = _number(0, 0, 100_000)  # first rounds that train the head alone
    head_steps: int = _number(1, 1, 10_000)
    head_sampling_rate: float = _number(0.2, 0, 1, open_low=True)
    # 0: expected_units in proportion to the rates
    head_expected_units: float = _number(0.0, 0, 1e9)
    head_optimizer: str = _choice("sgd", "sgd", "adamw")
    head_learning_rate: float = _number(1.0, 0, 1e3, open_low=True)
    micro_batch_tokens: int = _number(4096, 1, 1 << 24, tuning=True)
    precision: str = _choice("auto", "auto", "bf16", "fp32", tuning=True)
    attention: str = _choice("auto", "auto", "eager", "sdpa", tuning=True)


@dataclass(frozen=True)
class PrivacyConfig:
    mode: str = _choice("record", "record", "client", "none")
    epsilon: float = _number(3.0, 0, 1e4, open_low=True)
    delta: float = _number(1e-5, 0, 0.5, open_low=True)
    clip: float = _number(1.0, 1e-6, 1e6)
    # adapter phase: a clip of the head's own; 0: one for all
    head_clip: float = _number(0.0, 0, 1e6)
    head_phase_clip: float = _number(1.0, 1e-6, 1e6)
    # of ε that the head phase may use
    head_epsilon_share: float = _number(0.5, 0, 1, open_low=True)
    # The population of data.train: in a shared ledger, all runs on it charge one budget.
    population: str = _text("population", NAME)


@dataclass(frozen=True)
class AggregationConfig:
    strategy: str = _choice("fedavg", "fedavg")
    # the coordinator learns sums of at least minimum_cohort updates, and nothing else
    secure: bool = False
    minimum_cohort: int = _number(5, 3, 1000)
    max_colluders: int = _number(1, 0, 1000)  # institutions that may side with the coordinator
    epoch_rounds: int = _number(8, 1, 256)  # for which keys and shares are exchanged ahead


@dataclass(frozen=True)
class FaultsConfig:
    """Simulations of secure aggregation only: the share that drops out before a stage."""

    keys: float = _number(0.0, 0, 1)
    shares: float = _number(0.0, 0, 1)
    input: float = _number(0.0, 0, 1)
    confirm: float = _number(0.0, 0, 1)
    open: float = _number(0.0, 0, 1)
    attack: str = _choice("none", "none", *ATTACKS)  # the coordinator's, or on the way


@dataclass(frozen=True)
class ServerConfig:
    optimizer: str = _choice("none", "none", "momentum", "adam", "yogi")
    learning_rate: float = _number(1.0, 0, 1e3, open_low=True)
    momentum: float = _number(0.9, 0, 0.9999)
    beta2: float = _number(0.99, 0, 0.99999)
    # share of a phase's last rounds whose states are averaged
    average_last: float = _number(0.0, 0, 1)
    decay: str = _choice("none", "none", "linear")  # of the learning rate, over a phase's rounds
    head_optimizer: str = _choice("momentum", "none", "momentum", "adam", "yogi")
    head_learning_rate: float = _number(1.0, 0, 1e3, open_low=True)


@dataclass(frozen=True)
class Config:
    """The whole of a run's configuration; sections as in the TOML file."""

    seed: int = _number(7, 0, 2**63 - 1)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)


def is_expression(target: str) -> bool:
    """Whether a target is a regular expression, and not the end of a layer's name."""
    return target.startswith("re:") or re.fullmatch(r"[\w.-]+", target) is None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file; `overrides` are `section.key=VALUE` in TOML. BadInput lists all faults."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)  # never more, whatever kind of file this is
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path}: can't be read ({reason}), expected a TOML file") from error
    _check_size(len(data), path.name)
    try:
        return parse_config(data.decode("utf-8-sig"), path.name, overrides)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path.name}: found a byte that is not UTF-8 at {error.start}, expected TOML"
        ) from error


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


def config_to_toml(config: Config) -> str:
    """The configuration as TOML that `parse_config` reads back to the same value."""
    return to_toml(config)


def check_delta(delta: float, units: int, where: str) -> None:
    """δ must be below one over the number of units: at 1/n, publishing a record is 'private'."""
    if units and delta >= 1 / units:
        raise BadInput(
            f"{where} [privacy] delta = {delta:g}: expected less than 1/{units} = {1 / units:.2g}"
        )


def check_rules(section: Any, where: str) -> list[str]:
    """What is wrong with a section's values that did not come through TOML: one line to a fault."""
    faults = []
    for each in fields(section):
        value, rule = getattr(section, each.name), each.metadata.get("rule")
        fault = rule.fault(value, NOUNS.get(type(value), "a value")) if rule is not None else ""
        if fault:
            found = [*value] if isinstance(value, tuple) else value
            faults.append(f"{where} {each.name} = {shown(found)}: {fault}")
    return faults


def _check_size(size: int, where: str) -> None:
    if size > MAX_CONFIG_BYTES:
        raise BadInput(f"{where}: found more than {MAX_CONFIG_BYTES} bytes, expected at most 1 MiB")


Fault = tuple[tuple[str, ...], str]  # the fields that it is about, and the line to print


def _together(config: Config) -> Iterator[Fault]:
    """Faults of fields that are right alone and wrong together."""
    federation, training = config.federation, config.training
    if config.aggregation.secure:
        yield from _secure(config)
    elif config.faults != FaultsConfig():
        yield ("aggregation.secure",), "[faults]: expected none without [aggregation] secure = true"
    if config.privacy.mode == "client":
        yield from _client_level(config)
    if federation.partition == "by-column" and not federation.column:
        paths = ("federation.partition", "federation.column")
        yield paths, '[federation] column = "": expected a column, since partition = "by-column"'
    if training.head_rounds > federation.rounds:
        paths = ("training.head_rounds", "federation.rounds")
        found = f"[training] head_rounds = {training.head_rounds}"
        yield paths, f"{found}: expected at most [federation] rounds = {federation.rounds}"
    if config.model.head_hidden > 0 and config.model.pooling == "default":
        paths = ("model.head_hidden", "model.pooling")
        found = f"[model] head_hidden = {config.model.head_hidden}"
        yield paths, f"{found}: {POOLED}"
    if config.model.projection > 0 and config.model.pooling == "default":
        found = f"[model] projection = {config.model.projection}"
        yield ("model.projection", "model.pooling"), f"{found}: {POOLED}"
    if config.model.kernel_directions > 0 and not config.model.projection:
        found = f"[model] kernel_directions = {config.model.kernel_directions}"
        paths = ("model.kernel_directions", "model.projection")
        yield paths, f"{found}: expected 0 with projection = 0"
    if config.model.pooled_layers and config.model.pooling != "layers":
        paths = ("model.pooled_layers", "model.pooling")
        found = f'[model] pooled_layers: expected [] with pooling = "{config.model.pooling}"'
        yield paths, f'{found}, or "layers"'
    if len(config.data.labels) == 1:
        yield (
            ("data.labels",),
            f"[data] labels = {shown([*config.data.labels])}: expected [] or at least two",
        )
    if config.model.task == "causal-lm":
        yield from _causal(config)


def _secure(config: Config) -> Iterator[Fault]:
    """What secure aggregation can't be combined with, and why."""
    federation, asked = config.federation, config.aggregation
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


def _client_level(config: Config) -> Iterator[Fault]:
    """What noise that is shared between institutions can't be combined with, and why."""
    if not config.aggregation.secure:
        found = '[privacy] mode = "client"'
        yield (
            ("privacy.mode", "aggregation.secure"),
            (
                f"{found}: expected [aggregation] secure = true: a single update has but a share of"
                " the noise"
            ),
        )
    if config.privacy.head_clip > 0:
        found = f"[privacy] head_clip = {config.privacy.head_clip:g}"
        yield (
            ("privacy.mode", "privacy.head_clip"),
            f'{found}: expected 0 with mode = "client": one clip for all',
        )


def _causal(config: Config) -> Iterator[Fault]:
    """A language model has no pooling, no labels and no head of its own."""
    since = 'since task = "causal-lm"'
    if not config.data.response:
        yield ("model.task", "data.response"), f'[data] response = "": expected a column, {since}'
    if config.model.pooling != "default":
        found = f'[model] pooling = "{config.model.pooling}"'
        yield ("model.task", "model.pooling"), f'{found}: expected "default", {since}'
    if config.training.head_rounds > 0:
        found = f"[training] head_rounds = {config.training.head_rounds}"
        yield ("model.task", "training.head_rounds"), f"{found}: expected 0, {since}"
    if config.privacy.head_clip > 0:
        found = f"[privacy] head_clip = {config.privacy.head_clip:g}"
        yield ("model.task", "privacy.head_clip"), f"{found}: expected 0, {since}"
