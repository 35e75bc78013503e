"""A run's configuration: frozen dataclasses from TOML, every fault reported at once.

Each field says beside its default what it may be. Fields marked `tuning` change speed and memory only; all
others can change what is guaranteed or learnt, and most of them enter the signed manifest. Sections and keys
that are not known are refused with a suggestion; what is not built yet is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.common.errors import BadInput
from fedlora.common.toml import Bounds, Choice, read_table, section_faults, to_toml

MAX_CONFIG_BYTES = 1 << 20


def _number(default: float, low: float, high: float, *, open_low: bool = False, tuning: bool = False) -> Any:
    return field(default=default, metadata={"rule": Bounds(low, high, open_low), "tuning": tuning})


def _choice(default: str, *known: str, later: Sequence[str] = (), tuning: bool = False) -> Any:
    return field(default=default, metadata={"rule": Choice(known, tuple(later)), "tuning": tuning})


@dataclass(frozen=True)
class ModelConfig:
    base: str = "minilm"  # a directory, the name of an installed model package, or a hub id
    digest: str = ""  # "sha256:…": what the base must be
    task: str = _choice("sequence-classification", "sequence-classification", "causal-lm")
    max_length: int = _number(64, 4, 32_768)
    pooling: str = _choice("default", "default", "mean", "layers")
    pooled_layers: tuple[int, ...] = ()  # "layers": hidden states to pool, 0 the embeddings; empty: all
    head_hidden: int = _number(0, 0, 16_384)  # hidden width of our own head; 0: linear
    head_scale: float = _number(10.0, 0, 1e6, open_low=True)  # pooled features are multiplied by it


@dataclass(frozen=True)
class LoraConfig:
    rank: int = _number(8, 1, 1024)
    alpha: float = _number(16.0, 0, 1e6, open_low=True)
    targets: tuple[str, ...] = ("query", "value")
    layers: tuple[int, ...] = ()  # empty: all
    variant: str = _choice("lora", "lora", "ffa")


@dataclass(frozen=True)
class DataConfig:
    train: str = ""
    test: str = ""  # public
    validation: float | str = 0.03  # a public file, or the share of train that belongs to no client
    text: str = "text"
    prompt: str = ""
    response: str = ""
    label: str = "label"
    labels: tuple[str, ...] = ()  # public label set; empty: taken from test, never from train
    unit: str = ""  # the column that names the privacy unit; empty: the record


@dataclass(frozen=True)
class FederationConfig:
    clients: int = _number(10, 1, 1_000_000)
    partition: str = _choice("dirichlet", "iid", "dirichlet", "by-column", "shards", "quantity")
    alpha: float = _number(0.5, 0, 1e6, open_low=True)
    column: str = ""
    rounds: int = _number(20, 1, 100_000)
    spare_rounds: int = _number(0, 0, 100_000)  # attempts beyond rounds that the noise is calibrated for
    participation: float = _number(1.0, 0, 1, open_low=True)
    quorum: float = _number(1.0, 0, 1, open_low=True)
    deadline: float = _number(600.0, 0, 1e6, open_low=True)  # seconds
    patience: int = _number(0, 0, 100_000)  # early stopping on validation, in evaluations; 0: off
    evaluate_every: int = _number(1, 1, 100_000, tuning=True)  # rounds between looks at validation


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
    head_expected_units: float = _number(0.0, 0, 1e9)  # 0: expected_units in proportion to the rates
    head_optimizer: str = _choice("sgd", "sgd", "adamw")
    head_learning_rate: float = _number(1.0, 0, 1e3, open_low=True)
    micro_batch_tokens: int = _number(4096, 1, 1 << 24, tuning=True)
    precision: str = _choice("auto", "auto", "bf16", "fp32", tuning=True)
    attention: str = _choice("auto", "auto", "eager", "sdpa", tuning=True)


@dataclass(frozen=True)
class PrivacyConfig:
    mode: str = _choice("record", "record", "none", later=("client",))
    epsilon: float = _number(3.0, 0, 1e4, open_low=True)
    delta: float = _number(1e-5, 0, 0.5, open_low=True)
    clip: float = _number(1.0, 0, 1e6, open_low=True)
    head_clip: float = _number(0.0, 0, 1e6)  # adapter phase: a clip of the head's own; 0: one for all
    head_phase_clip: float = _number(1.0, 0, 1e6, open_low=True)
    head_epsilon_share: float = _number(0.5, 0, 1, open_low=True)  # of ε that the head phase may use


@dataclass(frozen=True)
class AggregationConfig:
    strategy: str = _choice("fedavg", "fedavg")
    secure: bool = False


@dataclass(frozen=True)
class ServerConfig:
    optimizer: str = _choice("none", "none", "momentum", "adam", "yogi")
    learning_rate: float = _number(1.0, 0, 1e3, open_low=True)
    momentum: float = _number(0.9, 0, 0.9999)
    beta2: float = _number(0.99, 0, 0.99999)
    average_last: float = _number(0.0, 0, 1)  # share of a phase's last rounds whose states are averaged
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


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file; `overrides` are `section.key=VALUE` with TOML values. BadInput lists every fault."""
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise BadInput(f"{path}: found {size} bytes, expected at most {MAX_CONFIG_BYTES}")
        text = path.read_bytes().decode()
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: found a byte that is not UTF-8 at {error.start}, expected TOML") from error
    return parse_config(text, path.name, overrides)


def parse_config(text: str, where: str = "config", overrides: Sequence[str] = ()) -> Config:
    """The configuration that `text` describes; BadInput lists every fault."""
    table = read_table(text, where, overrides)
    values, faults = section_faults(Config, table, where)
    if not faults:
        config: Config = values
        faults = [f"{where} {fault}" for fault in _together(config)]
    if faults:
        raise BadInput(faults)
    return config


def config_to_toml(config: Config) -> str:
    """The configuration as TOML that `parse_config` reads back to the same value."""
    return to_toml(config)


def check_delta(delta: float, units: int, where: str) -> None:
    """δ must be below one over the number of units: at 1/n, publishing a whole record is 'private'."""
    if units and delta >= 1 / units:
        raise BadInput(f"{where} [privacy] delta = {delta:g}: expected less than 1/{units} = {1 / units:.2g}")


def _together(config: Config) -> list[str]:
    """Faults of fields that are right alone and wrong together."""
    federation, training, model, data = config.federation, config.training, config.model, config.data
    causal = model.task == "causal-lm"
    share = data.validation
    checks = [
        (config.aggregation.secure, "[aggregation] secure = true: not built yet; expected false"),
        (
            federation.partition == "by-column" and not federation.column,
            '[federation] column = "": expected a column, since partition = "by-column"',
        ),
        (
            training.head_rounds > federation.rounds,
            f"[training] head_rounds = {training.head_rounds}: expected at most rounds = {federation.rounds}",
        ),
        (training.head_rounds > 0 and causal, "[training] head_rounds: a causal-lm has no head of its own; expected 0"),
        (causal and model.pooling != "default", f'[model] pooling = "{model.pooling}": a causal-lm pools nothing'),
        (causal and not data.response, '[data] response = "": expected a column, since task = "causal-lm"'),
        (
            model.head_hidden > 0 and model.pooling == "default",
            '[model] head_hidden: expected pooling = "mean" or "layers"',
        ),
        (not isinstance(share, str) and not 0 < share < 1, f"[data] validation = {share}: expected 0 < share < 1"),
        (len(set(data.labels)) != len(data.labels), "[data] labels: found a label twice"),
    ]
    return [fault for wrong, fault in checks if wrong]
