"""The configuration contract, and the bad inputs under "Config and policy" by their names."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.common.config.load import MAX_CONFIG_BYTES, load_config, parse_config
from fedlora.common.config.schema import (
    Config,
    LoraConfig,
    ModelConfig,
    check_delta,
    config_to_toml,
)
from fedlora.common.config.toml import UNDECIDED, literal
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Network

STRATEGIES = "fedavg, flexlora, median, trimmed-mean, multi-krum, norm-filter"

SECTIONS = [field.name for field in fields(Config) if field.name != "seed"]


def faults(text: str, *overrides: str) -> list[str]:
    """The lines that a person would read; none may be broken in two."""
    with pytest.raises(BadInput) as caught:
        parse_config(text, "run.toml", overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value).splitlines() == list(caught.value.faults)
    return list(caught.value.faults)


BAD = {
    "cfg-epsilon-nan": (
        "[privacy]\nepsilon = nan",
        ["run.toml [privacy] epsilon = nan: expected a finite number > 0 and <= 10000"],
    ),
    "cfg-epsilon-zero": (
        "[privacy]\nepsilon = 0",
        ["run.toml [privacy] epsilon = 0: expected a finite number > 0 and <= 10000"],
    ),
    "cfg-epsilon-negative": (
        "[privacy]\nepsilon = -3.0",
        ["run.toml [privacy] epsilon = -3.0: expected a finite number > 0 and <= 10000"],
    ),
    "cfg-epsilon-inf": (
        "[privacy]\nepsilon = inf",
        ["run.toml [privacy] epsilon = inf: expected a finite number > 0 and <= 10000"],
    ),
    "cfg-delta-string": (
        '[privacy]\ndelta = "1e-5"',
        ['run.toml [privacy] delta = "1e-5": expected a finite number > 0 and <= 0.5'],
    ),
    "cfg-unknown-key": (
        "[privacy]\nepsilom = 3.0",
        ['run.toml [privacy] epsilom: unknown key; did you mean "epsilon"?'],
    ),
    "cfg-unknown-key-section": (
        "[privcy]\nepsilon = 3.0",
        ['run.toml privcy: unknown key; did you mean "privacy"?'],
    ),
    "cfg-unknown-key-elsewhere": (
        "epsilon = 3.0\n[lora]\nclip = 1.0\nseed = 1",
        [
            "run.toml epsilon: unknown key; did you mean [privacy] epsilon?",
            "run.toml [lora] clip: unknown key; did you mean [privacy] clip?",
            "run.toml [lora] seed: unknown key; did you mean seed, before the first section?",
        ],
    ),
    "cfg-unit-record": (
        '[data]\nunit = "record"',
        ['run.toml [data] unit = "record": expected a column that is not called "record", or ""'],
    ),
    "cfg-bool-as-int": (
        "[federation]\nrounds = true",
        ["run.toml [federation] rounds = true: expected an integer >= 1 and <= 100000"],
    ),
    "cfg-int-as-bool": (
        "[training]\ncarry_optimizer = 1",
        ["run.toml [training] carry_optimizer = 1: expected true or false"],
    ),
    "cfg-wrong-type": (
        (
            "lora = 3\n[model]\ntask = 7\n[federation]\nrounds = 2.0\n[data]\nlabels = [1,"
            " 2]\nvalidation = []"
        ),
        [
            "run.toml [model] task = 7: expected one of sequence-classification,"
            " image-classification, audio-classification, multi-label, token-classification,"
            " regression, causal-lm, seq2seq",
            "run.toml lora = 3: expected a section [lora]",
            "run.toml [data] validation = []: expected a finite number > 0 and < 1 or a string",
            "run.toml [data] labels = [1, 2]: expected a list, each a string",
            "run.toml [federation] rounds = 2.0: expected an integer >= 1 and <= 100000",
        ],
    ),
    "cfg-column-of-another-medium": (
        '[model]\ntask = "audio-classification"\n[data]\nimage = "picture"',
        [
            'run.toml [data] image = "picture": expected "", since task = "audio-classification"',
            'run.toml [data] audio = "": expected a column of bytes or of paths, since task ='
            ' "audio-classification"',
        ],
    ),
    "cfg-several-faults": (
        (
            'seed = -1\n[lora]\nrank = 0\n[privacy]\nmod = "none"\nclip ='
            " -1.0\n[federation]\nclients = 4\n[aggregation]\nsecure = true"
        ),
        [
            "run.toml seed = -1: expected an integer >= 0 and <= 9223372036854775807",
            "run.toml [lora] rank = 0: expected an integer >= 1 and <= 1024",
            'run.toml [privacy] mod: unknown key; did you mean "mode"?',
            "run.toml [privacy] clip = -1.0: expected a finite number >= 1e-06 and <= 1e+06",
            (
                "run.toml [aggregation] minimum_cohort = 5: expected at most the 4 institutions of"
                " a round"
            ),
        ],
    ),
    "cfg-wire-under-masks": (
        '[federation]\nwire = "bfloat16"\n[aggregation]\nsecure = true',
        [
            'run.toml [federation] wire = "bfloat16": expected "float32" under masks, which have'
            " words of their own"
        ],
    ),
    "cfg-items": (
        (
            '[lora]\nlayers = [0, -1]\ntargets = []\n[data]\nlabels = ["a", "a"]\n[model]\ndigest ='
            ' "sha256:12"'
        ),
        [
            (
                'run.toml [model] digest = "sha256:12": expected "sha256:" and 64 hexadecimal'
                ' digits, or ""'
            ),
            "run.toml [lora] targets = []: found 0 items, expected at least 1",
            (
                "run.toml [lora] layers = [0, -1]: found -1, expected an integer >= 0 and <= 10000"
                " in each place"
            ),
            'run.toml [data] labels = ["a", "a"]: found an item twice, expected each once',
        ],
    ),
    "cfg-mode-client": (
        '[privacy]\nmode = "client"',
        [
            'run.toml [privacy] mode = "client": expected [aggregation] secure = true: a single'
            " update has but a share of the noise"
        ],
    ),
    "cfg-colluders-of-a-larger-cohort": (
        (
            "[federation]\nclients = 14\n[aggregation]\nsecure = true\nminimum_cohort ="
            " 6\nmax_colluders = 3"
        ),
        [
            "run.toml [aggregation] max_colluders = 3: expected at most 2: nodes would refuse a"
            " cohort of 7"
        ],
    ),
    "cfg-colluders-of-many-cohorts": (
        (
            "[federation]\nclients = 20\n[aggregation]\nsecure = true\nminimum_cohort ="
            " 5\nmax_colluders = 4"
        ),
        [
            "run.toml [aggregation] max_colluders = 4: expected at most 2: nodes would refuse a"
            " cohort of 5, 6, 7, 8, …"
        ],
    ),
    "cfg-secure-participation-of-thousands": (
        (
            "[federation]\nclients = 1001\nparticipation = 0.1\n[aggregation]\nsecure ="
            " true\nepoch_rounds = 1"
        ),
        ["run.toml [federation] clients = 1001: expected at most 1000: every pair shares a mask"],
    ),
    "cfg-mode-client-head-clip": (
        '[privacy]\nmode = "client"\nhead_clip = 0.5\n[aggregation]\nsecure = true',
        ['run.toml [privacy] head_clip = 0.5: expected 0 with mode = "client": one clip for all'],
    ),
    "cfg-strategy-later": (
        '[aggregation]\nstrategy = "svd"',
        [f'run.toml [aggregation] strategy = "svd": expected one of {STRATEGIES}'],
    ),
    "cfg-variant-elsewhere": (
        '[lora]\nvariant = "fedsa"',
        [
            'run.toml [lora] variant = "fedsa": expected one of lora, ffa, rolora; B of one\'s own'
            " is trained after the run, by fedlora-sim personalise RUN --lora"
            " (docs/aggregation.md says why)"
        ],
    ),
    "cfg-strategy-unknown": (
        '[aggregation]\nstrategy = "fedavgg"',
        [
            f'run.toml [aggregation] strategy = "fedavgg": expected one of {STRATEGIES}; did you'
            ' mean "fedavg"?'
        ],
    ),
    "cfg-column-missing": (
        '[federation]\npartition = "by-column"',
        ['run.toml [federation] column = "": expected a column, since partition = "by-column"'],
    ),
    "cfg-head-rounds-over-rounds": (
        "[federation]\nrounds = 20\n[training]\nhead_rounds = 21",
        ["run.toml [training] head_rounds = 21: expected at most [federation] rounds = 20"],
    ),
    "cfg-pairs-of-one-text": (
        '[model]\npooling = "pairs"',
        ['run.toml [model] pooling = "pairs": expected two columns in [data] text, found ["text"]'],
    ),
    "cfg-words": (
        '[model]\ntask = "token-classification"\npooling = "mean"\n[data]\ntext = ["a", "b", "c"]',
        [
            'run.toml [data] text = ["a", "b", "c"]: expected one column, or the two of a pair',
            'run.toml [model] pooling = "mean": expected "words", since task ='
            ' "token-classification"',
        ],
    ),
    "cfg-words-of-a-text": (
        '[model]\npooling = "words"\nprojection = 4',
        [
            'run.toml [model] pooling = "words": expected default, mean or layers, since task ='
            ' "sequence-classification"',
            'run.toml [model] projection = 4: expected 0 with pooling = "words"',
        ],
    ),
    "cfg-pooling": (
        '[model]\npooling = "default"\nhead_hidden = 8\npooled_layers = [1]',
        [
            (
                "run.toml [model] head_hidden = 8: "
                'expected 0 with pooling = "default", or pooling = "mean" or "layers"'
            ),
            'run.toml [model] pooled_layers: expected [] with pooling = "default", or "layers"',
        ],
    ),
    "cfg-one-label": (
        '[data]\nlabels = ["a"]',
        ['run.toml [data] labels = ["a"]: expected [] or at least two'],
    ),
    "cfg-causal": (
        (
            '[model]\ntask = "causal-lm"\npooling = "mean"\n'
            "[training]\nhead_rounds = 2\n[privacy]\nhead_clip = 0.5"
        ),
        [
            'run.toml [model] pooling = "mean": expected "default", since task = "causal-lm"',
            'run.toml [training] head_rounds = 2: expected 0, since task = "causal-lm"',
            'run.toml [privacy] head_clip = 0.5: expected 0, since task = "causal-lm"',
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_configuration(text: str, expected: list[str]) -> None:
    assert faults(text) == expected


@pytest.mark.parametrize("fault", ["cfg-file-over-1MiB", "missing", "folder", "not-utf8"])
def test_bad_file(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    if fault == "cfg-file-over-1MiB":
        path.write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
        expected = f"run.toml: found more than {MAX_CONFIG_BYTES} bytes, expected at most 1 MiB"
    elif fault == "missing":
        expected = f"{path}: can't be read (No such file or directory), expected a TOML file"
    elif fault == "folder":
        path.mkdir()
        expected = f"{path}: can't be read (Is a directory), expected a TOML file"
    else:
        path.write_bytes(b'[data]\ntext = "caf\xe9"')
        expected = "run.toml: found a byte that is not UTF-8 at 18, expected TOML"
    with pytest.raises(BadInput) as caught:
        load_config(path)
    assert caught.value.faults == (expected,)


def test_a_file_of_exactly_1_mib_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"seed = 5\n" + b"#" * (MAX_CONFIG_BYTES - 9))
    assert load_config(path).seed == 5


@pytest.mark.parametrize(
    ("delta", "units", "refused"),
    [
        (1e-5, 99_999, False),
        (1e-5, 100_000, True),
        (0.5, 2, True),
        (0.5, 1, False),
        (1e-5, 0, False),
    ],
    ids=["below", "cfg-delta-not-below-1/n", "half", "one-unit", "no-units"],
)
def test_delta_against_the_units(delta: float, units: int, refused: bool) -> None:
    if not refused:
        check_delta(delta, units, "train.parquet")
        return
    with pytest.raises(
        BadInput, match=rf"train.parquet \[privacy\] delta = .*: expected less than 1/{units}"
    ):
        check_delta(delta, units, "train.parquet")


@pytest.mark.parametrize(
    "text",
    [
        "[privacy\n",
        "seed = 1\nseed = 2",
        "seed = " + "9" * 5_000,
        "[data]\nlabels = " + "[" * 3_000,
        "seed = 0x" + "f" * 20_000,
        "[data]\nvalidation = 0x" + "f" * 2_000,
        '"line\\nbreak" = 1',
        '[data]\ntext = "line\\nbreak"',
        '[data]\ntext = "line\\u2028break"',
        '[model]\nbase = ""',
        f'"{"k" * 9_000}" = 1',
    ],
    ids=lambda text: text[:20].replace("\n", " "),
)
def test_hostile_text_ends_in_short_lines(text: str) -> None:
    assert all(len(line) < 400 for line in faults(text))


def test_a_fault_in_one_field_does_not_cast_doubt_on_another() -> None:
    """rounds is wrong, so that nothing can be said of head_rounds, which must stay below it."""
    found = faults("[federation]\nrounds = 0\n[training]\nhead_rounds = 30")
    assert found == ["run.toml [federation] rounds = 0: expected an integer >= 1 and <= 100000"]


def test_the_contract_of_design() -> None:
    """Names and defaults that users write down."""
    assert parse_config("") == Config()
    config = Config()
    assert SECTIONS == [
        "model",
        "lora",
        "data",
        "federation",
        "training",
        "privacy",
        "evaluation",
        "aggregation",
        "server",
        "faults",
        "tracking",
    ]
    assert (config.seed, config.model.base, config.model.max_length) == (7, "minilm", 64)
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 16.0, ("auto",))
    assert (config.data.validation, config.data.label) == (0.03, "label")
    assert config.data.text == ("text",)
    assert (config.federation.clients, config.federation.partition, config.federation.alpha) == (
        10,
        "dirichlet",
        0.5,
    )
    assert (
        config.federation.rounds,
        config.federation.spare_rounds,
        config.federation.deadline,
    ) == (UNDECIDED, UNDECIDED, 600)
    assert (
        config.training.steps,
        config.training.sampling_rate,
        config.training.expected_units,
    ) == (UNDECIDED, UNDECIDED, UNDECIDED)
    assert (config.privacy.mode, config.privacy.epsilon, config.privacy.delta) == (
        "record",
        3.0,
        1e-5,
    )
    assert (config.aggregation.strategy, config.aggregation.secure) == ("fedavg", False)
    assert (config.server.optimizer, config.server.learning_rate) == ("auto", UNDECIDED)


def test_what_is_left_to_the_rules_is_written_as_auto() -> None:
    """A number that nobody gave comes back as such; -1 itself is no value."""
    said = parse_config('[federation]\nrounds = "auto"\n[training]\nsteps = 3')
    assert (said.federation.rounds, said.training.steps) == (UNDECIDED, 3)
    text = config_to_toml(said)
    assert 'rounds = "auto"' in text and "-1" not in text and parse_config(text) == said
    assert faults("[training]\nsteps = -1") == [
        "run.toml [training] steps = -1: expected an integer >= 1 and <= 10000"
    ]
    # a number that no rule chooses
    assert faults('[privacy]\nepsilon = "auto"') == [
        'run.toml [privacy] epsilon = "auto": expected a finite number > 0 and <= 10000'
    ]


def test_performance_knobs_are_told_apart() -> None:
    """What may differ between two runs that promise the same."""
    knobs = {
        f"{section}.{field.name}"
        for section in SECTIONS
        for field in fields(getattr(Config(), section))
        if field.metadata.get("tuning")
    }
    assert knobs == {
        "training.micro_batch_tokens",
        "training.checkpointing",
        "training.precision",
        "training.attention",
        "tracking.tensorboard",
        "tracking.mlflow",
        "tracking.wandb",
    }


def test_every_field_but_switches_has_a_rule() -> None:
    bare = {
        field.name
        for section in [Config(), *(getattr(Config(), name) for name in SECTIONS)]
        for field in fields(section)
        if "rule" not in field.metadata
        and not isinstance(getattr(section, field.name), bool)
        and not is_dataclass(getattr(section, field.name))
    }
    assert bare == set()


def test_overrides_are_laid_over_the_file() -> None:
    text = "[privacy]\nepsilon = 1.0\n[lora]\nlayers = [0]"
    overrides = (
        "privacy.epsilon=8",
        "data.train=../a=b.csv",
        "lora.layers=[3, 4]",
        "seed=9",
        "data.validation=v.csv",
    )
    config = parse_config(text, "run.toml", overrides)
    assert (config.privacy.epsilon, config.lora.layers, config.seed) == (8.0, (3, 4), 9)
    assert (config.data.train, config.data.validation) == ("../a=b.csv", "v.csv")
    assert isinstance(config.privacy.epsilon, float)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "privacy.epsilon=nan",
            "--set privacy.epsilon = nan: expected a finite number > 0 and <= 10000",
        ),
        ("privacy.epsilom=1", '--set privacy.epsilom: unknown key; did you mean "epsilon"?'),
        ("privacy.epsilon", '--set "privacy.epsilon": expected section.key=VALUE'),
        ("a.b.c=1", '--set "a.b.c=1": expected section.key=VALUE'),
        ("=1", '--set "=1": expected section.key=VALUE'),
        ("seed.x=1", '--set "seed.x=1": found seed = 7, expected a section [seed]'),
        ("federation.rounds=1\n[x]\ny=2", None),
        ("model.base=\udcff", None),
    ],
)
def test_bad_override(override: str, expected: str | None) -> None:
    (found,) = faults("seed = 7", override)
    assert found.startswith("--set ") and expected in (None, found)


def test_every_bad_override_is_named() -> None:
    assert len(faults("", "a", "b.c.d=1")) == 2


# Round trip: any value that the reader takes comes back the same.

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20)
PATHS = NAMES.filter(lambda name: re.search(r"^\s|\s$", name) is None)  # else none, as is said
POSITIVE = st.floats(1e-300, 1e4, allow_nan=False)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    base = Config(seed=draw(st.integers(0, 2**63 - 1)))
    layers = tuple(draw(st.lists(st.integers(0, 100), unique=True, max_size=4)))
    return replace(
        base,
        model=replace(base.model, base=draw(PATHS), head_scale=draw(POSITIVE)),
        lora=replace(
            base.lora,
            layers=layers,
            targets=tuple(draw(st.lists(NAMES, unique=True, min_size=1, max_size=3))),
        ),
        data=replace(
            base.data,
            validation=draw(st.floats(0, 1, exclude_min=True, exclude_max=True) | PATHS),
            labels=tuple(draw(st.lists(NAMES, unique=True, min_size=2, max_size=5))),
        ),
        training=replace(
            base.training, carry_optimizer=draw(st.booleans()), steps=draw(st.integers(1, 10_000))
        ),
        privacy=replace(base.privacy, epsilon=draw(POSITIVE)),
    )


@given(configs())
def test_round_trip_through_toml(config: Config) -> None:
    assert parse_config(config_to_toml(config)) == config


@given(
    st.sampled_from([f"{s}.{f.name}" for s in SECTIONS for f in fields(getattr(Config(), s))]),
    st.one_of(
        st.integers(),
        st.floats(),
        st.booleans(),
        st.text(max_size=9),
        st.lists(st.integers(), max_size=3),
    ),
)
def test_any_value_is_taken_or_refused_by_name(path: str, value: Any) -> None:
    """No value of any type crashes the reader; what is taken has its type and round-trips."""
    section, key = path.split(".")
    shown = repr(value).lower() if isinstance(value, bool | float) else repr(value)
    try:
        config = parse_config("", "run.toml", [f"{path}={shown}"])
    except BadInput as error:
        assert any(key in line or section in line for line in error.faults)
        return
    assert type(getattr(getattr(config, section), key)) in (str, int, float, bool, tuple)
    assert parse_config(config_to_toml(config)) == config


def test_a_network_is_what_its_configuration_says() -> None:
    model, lora = (
        ModelConfig(pooling="layers", pooled_layers=(0, 3), head_hidden=4),
        LoraConfig(rank=3, targets=("query", "value")),
    )
    network = Network.of(model, lora)
    assert network.configs(model.base) == (model, lora)
    with pytest.raises(BadInput, match=r"manifest network rank = 0: expected"):
        replace(network, rank=0).configs("b")
    with pytest.raises(BadInput, match=r"manifest network pooling"):
        replace(network, pooling="cls").configs("b")


MAY_BE_EMPTY = ("data.train", "data.test", "data.public", "tracking.mlflow")


@pytest.mark.parametrize("path", ["model.base", "data.validation", *MAY_BE_EMPTY])
@pytest.mark.parametrize("value", ["", " ", "x.csv ", "\u00a0x"])
def test_a_path_is_not_empty_and_has_no_white_space_at_its_ends(path: str, value: str) -> None:
    """An empty one would be read as the folder that one stands in."""
    section, key = path.split(".")
    given = f"{path} = {literal(value)}"
    if not value and path in MAY_BE_EMPTY:
        assert parse_config(given)
        return
    expected = "expected a path without white space at its ends" + ', or ""' * (
        path in MAY_BE_EMPTY
    )
    assert faults(given) == [f"run.toml [{section}] {key} = {literal(value)}: {expected}"]
