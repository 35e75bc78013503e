"""A run's configuration: frozen dataclasses from TOML, every fault reported at once.

Each field says beside its default what it may be. Fields marked `tuning` change speed and memory
only; all others can change what is guaranteed or learnt, and most of them enter the signed
manifest. Sections, keys and names that are not known are refused with a suggestion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from fedlora.common.config.task_names import BUILT_IN, TaskName
from fedlora.common.config.toml import (
    AUTO,
    UNDECIDED,
    Bounds,
    Choice,
    Each,
    Pattern,
    Rule,
    to_toml,
    undecided,
)
from fedlora.common.errors import BadInput

DIGEST = Pattern(r"(sha256:[0-9a-f]{64})?", '"sha256:" and 64 hexadecimal digits, or ""')
LETTER = r"[^\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]"  # one line, and writable as UTF-8
NAME = Pattern(LETTER + "{1,4096}", "one line of text")
OPTIONAL = Pattern(LETTER + "{0,4096}", 'one line of text, or ""')
# of a file or folder, or what may stand for one; an empty path would mean the current folder
PATH = Pattern(rf"(?!\s){LETTER}{{1,4096}}(?<!\s)", "a path without white space at its ends")
OPTIONAL_PATH = Pattern(f"({PATH.pattern})?", f'{PATH.what}, or ""')
UNIT = Pattern(rf"(?!record\Z){OPTIONAL.pattern}", 'a column that is not called "record", or ""')
LAYER, ALL_LINEAR = Bounds(0, 10_000), "all-linear"  # of [lora] layers and targets, as is AUTO
# strategies that compare updates: how many they need beyond twice the hostile ones
ROBUST = {"median": 1, "trimmed-mean": 1, "multi-krum": 3, "norm-filter": 1}
ADAPTIVE = ("adam", "yogi")  # server optimisers whose steps have a size of their own
FLEXLORA = "flexlora"  # a strategy that needs each institution's product B·A
VARIANT = Choice(
    ("lora", "ffa", "rolora"),
    elsewhere=(
        (
            "fedsa",
            "B of one's own is trained after the run, by fedlora-sim personalise RUN --lora"
            " (docs/aggregation.md says why)",
        ),
    ),
)
COUNTS = Choice(("right", "classes", "confusion", "groups", "loss"))
ATTACKS = ("sybil", "small-u2", "two-lists", "corrupt-share")


def _number(
    default: float | str,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
    tuning: bool = False,
    text: Rule | None = None,
) -> Any:
    rule = Bounds(low, high, open_low, open_high, text)
    return field(default=default, metadata={"rule": rule, "tuning": tuning})


def _choice(default: str, *known: str, tuning: bool = False) -> Any:
    return field(default=default, metadata={"rule": Choice(known), "tuning": tuning})


def _chosen(low: float, high: float, *, open_low: bool = False) -> Any:
    """A number that is chosen by rule (`server/defaults`) where none is given."""
    rule = Bounds(low, high, open_low)
    return field(default=UNDECIDED, metadata={"rule": rule, "auto": True})


def _measured(low: float, high: float) -> Any:
    """A number that changes speed and memory, and is found by measuring where none is given."""
    rule = Bounds(low, high)
    return field(default=UNDECIDED, metadata={"rule": rule, "auto": True, "tuning": True})


def _chosen_name(*known: str) -> Any:
    return field(default=AUTO, metadata={"rule": Choice(known), "auto": True})


def _text(default: str, rule: Pattern = OPTIONAL, *, tuning: bool = False) -> Any:
    return field(default=default, metadata={"rule": rule, "tuning": tuning})


def _items(default: tuple[Any, ...], rule: Rule, shortest: int = 0, one: bool = False) -> Any:
    return field(default=default, metadata={"rule": Each(rule, shortest), "one": one})


@dataclass(frozen=True)
class ModelConfig:
    """[model]: the frozen base, what is read from it, and our own head."""

    # a directory, the name of an installed model package, or a hub id
    base: str = _text("minilm", PATH)
    digest: str = _text("", DIGEST)  # "sha256:…": what the base must be
    task: str = field(default=BUILT_IN[0], metadata={"rule": TaskName()})
    max_length: int = _number(64, 4, 32_768)
    # what a head reads: the base's own, a mean over a text's tokens, each token by itself, or how
    # the means of a pair's two texts differ
    pooling: str = _chosen_name("default", "mean", "layers", "words", "pairs")
    # for "layers": 0 is the embeddings; empty: all; for "words" and "pairs" the last one
    pooled_layers: tuple[int, ...] = _items((), LAYER)
    # principal directions of public features to whiten; 0: none
    projection: int = _number(0, 0, 16_384)
    projection_ridge: float = _number(1.0, 0, 1e6)
    kernel_directions: int = _number(0, 0, 16_384)  # similarities to public texts, on top; 0: none
    kernel_gamma: float = _number(6.0, 0, 1e4, open_low=True)
    head_hidden: int = _number(0, 0, 16_384)  # hidden width of our own head; 0: linear
    head_scale: float = _number(10.0, 0, 1e6, open_low=True)  # pooled features are multiplied by it
    # what frozen matrices are stored as; auto: bfloat16 where a GPU multiplies it, else float32;
    # int8 and nf4 round them so far that it is the same for all institutions
    dtype: str = _choice("auto", "auto", "float32", "bfloat16", "int8", "nf4")


@dataclass(frozen=True)
class LoraConfig:
    """[lora]: what is trained in the base."""

    rank: int = _number(8, 1, 1024)
    alpha: float = _number(16.0, 0, 1e6, open_low=True)
    # "auto", "all-linear", a regular expression (an `re:` before it makes one of a plain word), or
    # names of layers
    targets: tuple[str, ...] = _items((AUTO,), NAME, shortest=1, one=True)
    layers: tuple[int, ...] = _items((), LAYER)  # empty: all
    variant: str = field(default="lora", metadata={"rule": VARIANT})


@dataclass(frozen=True)
class DataConfig:
    """[data]: files, their columns, and the privacy unit."""

    train: str = _text("", OPTIONAL_PATH)
    # A public file, or the share of train that is set aside as public.
    test: float | str = _number("", 0, 1, open_low=True, open_high=True, text=OPTIONAL_PATH)
    # A public file, or the share of train that belongs to no client.
    validation: float | str = _number(0.03, 0, 1, open_low=True, open_high=True, text=PATH)
    # what a projection is fitted on and a run starts from; "": half of the validation part
    public: str = _text("", OPTIONAL_PATH)
    text: tuple[str, ...] = _items(("text",), NAME, shortest=1, one=True)  # or the two of a pair
    image: str = _text("")  # bytes, or paths from the table's folder on
    audio: str = _text("")
    prompt: str = _text("")  # causal-lm; without a response, the text itself
    response: str = _text("")
    label: str = _text("label", NAME)
    # public label set; empty: taken from test, never from train
    labels: tuple[str, ...] = _items((), NAME)
    scale: tuple[float, ...] = _items((), Bounds(-1e9, 1e9))  # public ends of a regression's number
    tokens: str = _text("")  # a column of lists of words; their tags, or spans of text, in tags
    tags: str = _text("")
    messages: str = _text("")  # causal-lm: a column of conversations
    unit: str = _text("", UNIT)  # the column that names the privacy unit; empty: the record


@dataclass(frozen=True)
class FederationConfig:
    """[federation]: who takes part, and how rounds begin and end."""

    clients: int = _number(10, 1, 1_000_000)
    partition: str = _choice("dirichlet", "iid", "dirichlet", "by-column", "shards", "quantity")
    alpha: float = _number(0.5, 0, 1e6, open_low=True)
    column: str = _text("")  # by-column
    rounds: int = _chosen(1, 100_000)
    # attempts beyond rounds that the noise is calibrated for
    spare_rounds: int = _chosen(0, 100_000)
    # privacy units of all institutions together, about, and public: what rules reckon with
    units: int = _chosen(1, 1_000_000_000)
    participation: float = _number(1.0, 0, 1, open_low=True)
    quorum: float = _number(1.0, 0, 1, open_low=True)
    deadline: float = _number(600.0, 0, 1e6, open_low=True)  # seconds
    patience: int = _number(0, 0, 100_000)  # early stopping on validation, in evaluations; 0: off
    evaluate_every: int = _number(1, 1, 100_000)  # rounds between looks at validation
    # what an update is rounded to, after its noise: bfloat16 is half as many bytes
    wire: str = _choice("float32", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """[training]: what an institution computes in a round."""

    steps: int = _chosen(1, 10_000)
    sampling_rate: float = _chosen(0, 1, open_low=True)
    expected_units: float = _chosen(0, 1e9, open_low=True)
    optimizer: str = _chosen_name("sgd", "adamw")
    carry_optimizer: bool = True
    learning_rate: float = _chosen(0, 1e3, open_low=True)
    proximal_mu: float = _number(0.0, 0, 1e3)
    public_epochs: int = _chosen(0, 1_000)  # over public records, before the first round
    head_rounds: int = _chosen(0, 100_000)  # first rounds that train the head alone
    moves: str = _chosen_name("lora", "both")  # what the rounds after them move
    head_steps: int = _chosen(1, 10_000)
    head_sampling_rate: float = _chosen(0, 1, open_low=True)
    head_expected_units: float = _chosen(0, 1e9)  # 0: expected_units in proportion to the rates
    head_optimizer: str = _chosen_name("sgd", "adamw")
    head_learning_rate: float = _chosen(0, 1e3, open_low=True)
    # fixed: what a record gives depends on no other, to the last bit; packed: by length, as many as
    # fit; auto: packed where one researcher computes all institutions, else fixed
    batches: str = _choice("auto", "auto", "fixed", "packed")
    # padded tokens that go through the model together; auto: as a short measurement finds best
    micro_batch_tokens: int = _measured(1, 1 << 24)
    # compute layers again on the way back instead of keeping what is in them: slower, far smaller
    checkpointing: bool = field(default=False, metadata={"tuning": True})
    precision: str = _choice("auto", "auto", "bf16", "fp32", tuning=True)
    attention: str = _choice("auto", "auto", "eager", "sdpa", tuning=True)


@dataclass(frozen=True)
class PrivacyConfig:
    """[privacy]: what is guaranteed, and to whom."""

    mode: str = _choice("record", "record", "client", "none")
    # of mode "record": "own" is whole at each institution; "shared" is of all together, under masks
    noise: str = _choice("own", "own", "shared")
    epsilon: float = _number(3.0, 0, 1e4, open_low=True)
    delta: float = _number(1e-5, 0, 0.5, open_low=True)
    clip: float = _chosen(1e-6, 1e6)
    # adapter phase: a clip of the head's own; 0: one for all
    head_clip: float = _number(0.0, 0, 1e6)
    head_phase_clip: float = _chosen(1e-6, 1e6)
    # of ε that the head phase may use
    head_epsilon_share: float = _chosen(0, 1, open_low=True)
    # The population of data.train: in a shared ledger, all runs on it charge one budget.
    population: str = _text("population", NAME)
    # What all of them together may spend there; 0: no more than this run.
    budget_epsilon: float = _number(0.0, 0, 1e4)
    budget_delta: float = _number(0.0, 0, 0.5)


@dataclass(frozen=True)
class EvaluationConfig:
    """[evaluation]: how the released adapter does on institutions' own records: noisy counts."""

    hold_out: float = _number(0.0, 0, 0.5)  # of each institution's units, not trained on; 0: none
    epsilon_share: float = _number(0.2, 0, 1, open_low=True, open_high=True)  # by itself, of ε
    attempts: int = _number(1, 1, 100)  # each is another release, and the noise is for all
    # right, or wrong; by classes; confusion; by groups; loss, by its size; empty: right, else loss
    counts: tuple[str, ...] = _items((), COUNTS)
    group: str = _text("")  # the column of groups that are compared, and its public values
    groups: tuple[str, ...] = _items((), NAME)


@dataclass(frozen=True)
class AggregationConfig:
    """[aggregation]: how updates are added."""

    strategy: str = _choice("fedavg", "fedavg", FLEXLORA, *ROBUST)
    hostile: int = _number(1, 1, 1000)  # institutions whose updates a robust strategy bears
    # the coordinator learns sums of at least minimum_cohort updates, and nothing else
    secure: bool = False
    minimum_cohort: int = _number(5, 3, 1000)
    max_colluders: int = _number(1, 0, 1000)  # institutions that may side with the coordinator
    epoch_rounds: int = _number(8, 1, 256)  # for which keys and shares are exchanged ahead

    @property
    def fewest(self) -> int:
        """Updates of a round below which the strategy says nothing."""
        return 2 * self.hostile + ROBUST[self.strategy] if self.strategy in ROBUST else 1


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
    """[server]: what the coordinator makes of a sum."""

    optimizer: str = _chosen_name("none", "momentum", *ADAPTIVE)
    learning_rate: float = _chosen(0, 1e3, open_low=True)
    momentum: float = _number(0.9, 0, 0.9999)
    beta2: float = _number(0.99, 0, 0.99999)
    # share of a phase's last rounds whose states are averaged
    average_last: float = _chosen(0, 1)
    # share of LoRA's rounds over which the learning rate rises; then it may fall, in both phases
    warmup: float = _chosen(0, 0.9)
    decay: str = _chosen_name("none", "linear")
    head_optimizer: str = _chosen_name("none", "momentum", *ADAPTIVE)
    head_learning_rate: float = _chosen(0, 1e6, open_low=True)  # in proportion to 1 / clip


@dataclass(frozen=True)
class TrackingConfig:
    """[tracking]: which trackers are told each round's public figures, beside metrics.jsonl."""

    tensorboard: bool = field(default=False, metadata={"tuning": True})  # in the run's folder
    mlflow: str = _text("", OPTIONAL_PATH, tuning=True)  # folder or server
    wandb: bool = field(default=False, metadata={"tuning": True})  # offline, in the run's folder


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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def is_expression(target: str) -> bool:
    """Whether a target is a regular expression, and not the end of a layer's name."""
    return target.startswith("re:") or re.fullmatch(r"[\w.-]+", target) is None


def config_to_toml(config: Config) -> str:
    """The configuration as TOML that `parse_config` reads back to the same value."""
    return to_toml(config)


def open_fields(config: Config) -> tuple[str, ...]:
    """`section.field` of all that the rules are to choose."""
    sections = {each.name: getattr(config, each.name) for each in fields(config)}
    return tuple(
        f"{name}.{each.name}"
        for name, section in sections.items()
        if name != "seed"
        for each in fields(section)
        if undecided(each, getattr(section, each.name)) and not each.metadata.get("tuning")
    )


def check_delta(delta: float, units: int, where: str) -> None:
    """δ must be below one over the number of units: at 1/n, publishing a record is 'private'."""
    if units and delta >= 1 / units:
        raise BadInput(
            f"{where} [privacy] delta = {delta:g}: expected less than 1/{units} = {1 / units:.2g}"
        )
