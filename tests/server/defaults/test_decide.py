"""What a configuration leaves open: chosen from public facts alone, and what is given stays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedlora.common.config.load import parse_config
from fedlora.common.config.parts import Terms
from fedlora.common.config.schema import Config, config_to_toml, open_fields
from fedlora.common.errors import BadInput
from fedlora.common.privacy.calibration import Asked
from fedlora.common.privacy.central_limit import gaussian_mu
from fedlora.common.privacy.record_level import RecordLevel
from fedlora.server.defaults.decide import decided
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.server.runs.schedule import public_phases
from fedlora.server.strategies.fedavg import ServerOptimizer
from fedlora.server.strategies.strategy import ServerState

FACTS = PublicFacts(units=10_000, classes=20)


def chosen(text: str = "", facts: PublicFacts = FACTS) -> Config:
    return decided(parse_config(text), facts)


def test_a_bare_configuration_is_a_head_phase_and_then_lora() -> None:
    head, lora = public_phases(Terms.of(chosen()))
    assert (head.name, head.rounds, head.steps, head.sampling_rate) == ("head", 30, 1, 1.0)
    assert head.expected_units == 1_000  # of an institution
    assert (lora.name, lora.rounds, lora.steps) == ("lora", 60, 1)
    assert lora.sampling_rate == pytest.approx(100_000 / (60 * 10_000))
    assert lora.expected_units == pytest.approx(1_000 * lora.sampling_rate)
    assert all(phase.attempts == phase.rounds + 2 for phase in (head, lora))


@pytest.mark.parametrize(("units", "rate"), [(500, 0.2), (4_000, 0.2), (200_000, 0.05)])
def test_draws_are_neither_whole_nor_too_small_to_amplify(units: int, rate: float) -> None:
    assert chosen("", PublicFacts(units, 2)).training.sampling_rate == rate


def test_nothing_is_left_open_and_what_is_decided_stays() -> None:
    config = chosen()
    assert open_fields(config) == () and len(open_fields(Config())) > 20
    assert decided(config, PublicFacts(5, 2)) == config
    assert parse_config(config_to_toml(config)) == config


def test_what_is_left_open_is_never_signed() -> None:
    with pytest.raises(BadInput, match=r"federation.rounds, .*expected a value in every place"):
        Terms.of(Config())


def test_what_is_given_stays() -> None:
    text = (
        '[model]\npooling = "layers"\n[federation]\nrounds = 10\nspare_rounds = 0\n'
        "[training]\nexpected_units = 7\n[server]\nhead_learning_rate = 0.5\n"
    )
    config = chosen(text)
    assert (config.model.pooling, config.federation.rounds) == ("layers", 10)
    assert (config.federation.spare_rounds, config.training.expected_units) == (0, 7)
    assert (config.server.head_learning_rate, config.training.head_rounds) == (0.5, 6)


@pytest.mark.parametrize("units", [200, 2_000, 200_000])
@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_the_heads_rate_lets_noise_move_a_logit_by_so_much_at_most(
    units: int, epsilon: float
) -> None:
    config = chosen(f"[privacy]\nepsilon = {epsilon}", PublicFacts(units, 2))
    head, terms = public_phases(Terms.of(config))[0], config.server
    share = 0.6 if units > 200 else 1.0  # of few units LoRA has nothing
    sigma = math.sqrt(head.rounds) / gaussian_mu(share * epsilon, 1e-5)
    noise = sigma * head.clip / head.expected_units / math.sqrt(10)
    rates = [terms.head_learning_rate * (1 - step / head.rounds) for step in range(head.rounds)]
    moved = 10.0 * noise * math.sqrt(sum(rate**2 for rate in rates))  # features have length 10
    assert moved <= 1.7
    suits = 4.5 * math.sqrt(2) / head.clip
    assert moved > 1.5 or terms.head_learning_rate == pytest.approx(suits)


def test_a_head_is_clipped_to_one_voice_a_unit_where_noise_is_a_bound_alone() -> None:
    """Else nearly whole gradients: as many answers are right, and as sure as they are right."""
    for units, classes, text, clip in (
        (60_000, 2, "", 10.0),
        (60_000, 2, "[privacy]\nepsilon = 1.0", 10.0),
        (6_000, 2, "[privacy]\nepsilon = 1.0", 1.0),
        (60_000, 4, "", 10.0),
        (15_000, 150, "", 1.0),
        (60_000, 2, "[server]\nhead_learning_rate = 5.0", 1.0),  # chosen for a clip of 1
        (60_000, 2, "[model]\nprojection = 64", 1.0),
        (60_000, 0, "", 1.0),
        (60_000, 1, "", 1.0),
        (60_000, 2, '[data]\ntext = ["a", "b"]', 10.0),
    ):
        facts = PublicFacts(units, classes)
        assert chosen(text, facts).privacy.head_phase_clip == clip, (units, classes, text)


def test_a_longer_clip_is_of_the_features_length_and_has_a_rate_that_is_as_much_smaller() -> None:
    found = chosen("[model]\nhead_scale = 5.0", PublicFacts(60_000, 2))
    assert found.privacy.head_phase_clip == 5.0
    assert found.server.head_learning_rate == pytest.approx(4.5 * math.sqrt(2) / 5)


def test_a_head_on_few_units_a_class_has_most_of_epsilon() -> None:
    for units, classes, share in (
        (592, 3, 0.85),
        (15_000, 150, 0.85),
        (3_668, 2, 0.6),
        (500, 0, 0.6),
    ):
        assert chosen("", PublicFacts(units, classes)).privacy.head_epsilon_share == share


def test_a_head_on_layers_side_by_side_goes_slower_as_its_features_are_longer() -> None:
    """Each layer has length 10; a projection brings them all to that together."""

    def rate(layers: str, more: str = "") -> float:
        return chosen(f"[model]\npooled_layers = {layers}\n{more}").server.head_learning_rate

    one = rate("[6]")
    assert rate("[1, 2, 4, 6]") == pytest.approx(one / 2)
    assert rate("[1, 2, 4, 6]", "projection = 64\n[data]\nvalidation = 0.1") == one


@pytest.mark.parametrize("units", [500, 10_000, 300_000])
def test_noise_moves_a_coordinate_of_lora_by_so_much_at_most(units: int) -> None:
    """By the noise that is calibrated in the end, and not by the estimate that the rule uses."""
    for name in ("momentum", "auto"):
        text = f'[privacy]\nepsilon = 8.0\n[server]\noptimizer = "{name}"'
        text += '\n[training]\nmoves = "lora"'
        config = chosen(text, PublicFacts(units, 2))
        terms = Terms.of(config)
        asked = Asked(terms.privacy, terms.aggregation, {}, None)
        _, lora = RecordLevel.calibrated(public_phases(terms), asked).phases
        noise = lora.noise_multiplier * lora.clip / lora.expected_units / math.sqrt(10)
        server = config.server
        if server.optimizer == "momentum":
            assert server.learning_rate * noise <= 0.9e-3
            assert (
                server.learning_rate == pytest.approx(1 / 3)
                or server.learning_rate * noise > 0.55e-3
            )
            continue
        optimizer = ServerOptimizer("adam", server.learning_rate, server.momentum, server.beta2)
        rng, memory = np.random.default_rng(0), ServerState({}, {})
        for _ in range(lora.rounds):
            moved, memory = optimizer.step(memory, rng.normal(0, noise, 1_000))
            assert server.learning_rate * float(np.abs(moved).mean()) < 2e-3


def test_lora_moves_further_where_gradients_of_many_classes_point_apart() -> None:
    for classes, step, clip in (
        (1, 2e-3, 0.5),
        (2, 2e-3, 3),
        (18, 3e-3, 1),
        (77, 4e-3, 1),
        (0, 4e-3, 1),
    ):
        config = chosen("", PublicFacts(10_000, classes))
        server = config.server
        assert (server.optimizer, config.privacy.clip) == ("adam", clip)
        assert server.learning_rate == pytest.approx(step)


def test_a_loss_that_is_a_mean_over_labels_has_clips_as_short_as_its_gradients() -> None:
    """Else its updates are as long as their noise, and a head hardly moves."""
    one, many = (
        chosen(f'[model]\ntask = "{task}"', PublicFacts(1_000_000, 28))
        for task in ("sequence-classification", "multi-label")
    )
    assert many.privacy.clip == pytest.approx(one.privacy.clip / 28)
    assert many.privacy.head_phase_clip == pytest.approx(3 / 28)
    heads = [each.server.head_learning_rate * each.privacy.head_phase_clip for each in (one, many)]
    assert heads[1] == pytest.approx(3 * heads[0])
    assert many.server.learning_rate == one.server.learning_rate  # Adam's steps have their size


def test_without_privacy_a_head_of_many_labels_goes_by_plain_steps() -> None:
    """By Adam it lost about what each label's rate alone loses, or more."""
    one, many = (
        chosen(
            f'[model]\ntask = "{task}"\n[privacy]\nmode = "none"', PublicFacts(40_000, 28)
        ).server
        for task in ("sequence-classification", "multi-label")
    )
    assert (one.head_optimizer, many.head_optimizer) == ("adam", "none")
    assert many.head_learning_rate == pytest.approx(98)


def test_without_privacy_small_steps_make_up_epochs() -> None:
    config = chosen('[privacy]\nmode = "none"')
    training = config.training
    rounds = config.federation.rounds - training.head_rounds
    assert (training.optimizer, config.server.optimizer) == ("adamw", "none")
    assert training.expected_units == pytest.approx(10)
    assert (rounds * training.steps, training.moves) == (300, "both")
    assert rounds * training.steps * training.sampling_rate == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(("units", "batch"), [(590, 4), (6_000, 6), (40_000, 32)])
def test_few_units_go_through_in_small_batches(units: int, batch: int) -> None:
    """Ten institutions: 59 documents in batches of 32 were ten steps, which taught nothing."""
    config = chosen('[privacy]\nmode = "none"', PublicFacts(units, 5))
    training, rounds = config.training, config.federation.rounds - config.training.head_rounds
    assert training.expected_units == pytest.approx(batch)
    steps = rounds * training.steps
    assert steps >= 300
    assert steps * training.sampling_rate == pytest.approx(max(3, 300 * 4 * 10 / units), rel=0.05)


PAIR = '[data]\ntext = ["a", "b"]\n'


def test_texts_of_a_pair_are_read_apart() -> None:
    for mode in ("none", "record"):
        config = chosen(f'{PAIR}[privacy]\nmode = "{mode}"')
        assert (config.model.pooling, config.training.head_rounds) == ("pairs", 30)
    assert chosen().model.pooling == "mean"


def test_of_pairs_the_many_do_not_outvote_the_few() -> None:
    """The bias alone, as of features all alike: two of three are of one class. A clip that all
    exceed ends at a chance of nearly 1 for it, which costs the rest dearly.
    """
    config = chosen(PAIR, PublicFacts(3_668, 2))
    clip, rate = config.privacy.head_phase_clip, config.server.head_learning_rate
    labels, weight = np.repeat([1.0, 0.0], [680, 320]), 0.0
    for step in range(30):
        error = 1 / (1 + math.exp(-10 * weight)) - labels
        clipped = 10 * error * np.minimum(1, clip / (10 * math.sqrt(2) * np.abs(error) + 1e-9))
        weight -= rate * (1 - step / 30) * float(clipped.mean())
    assert 1 / (1 + math.exp(-10 * weight)) == pytest.approx(0.68, abs=0.05)
    assert chosen(PAIR, PublicFacts(5_749, 1)).privacy.head_phase_clip == 1.0


def test_a_pair_read_as_one_text_begins_with_lora_without_privacy() -> None:
    for mode, rounds in (("none", 0), ("record", 30)):
        config = chosen(f'{PAIR}[model]\npooling = "mean"\n[privacy]\nmode = "{mode}"')
        assert config.training.head_rounds == rounds


def test_institutions_make_few_steps_between_two_means() -> None:
    """With skewed labels each goes its own way. Whole updates that are noised: few of them."""
    open_mode = chosen('[privacy]\nmode = "none"')
    whole = chosen('[privacy]\nmode = "client"\n[aggregation]\nsecure = true')
    assert open_mode.training.steps == 5
    rounds = [each.federation.rounds - each.training.head_rounds for each in (open_mode, whole)]
    assert rounds == [60, 10]
    assert whole.training.moves == "lora"


@pytest.mark.parametrize("classes", [2, 77])
def test_a_whole_update_has_one_length_whatever_its_classes(classes: int) -> None:
    """Its noise is in proportion to its clip, and no record's voice is in it."""
    text = f'{PAIR}[privacy]\nmode = "client"\n[aggregation]\nsecure = true'
    privacy = chosen(text, PublicFacts(10_000, classes)).privacy
    assert (privacy.clip, privacy.head_phase_clip) == (0.1, 1.0)


@pytest.mark.parametrize("mode", ["record", "none"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_rate_suits_the_optimizer_that_is_given(mode: str, optimizer: str) -> None:
    """AdamW's steps have a size of their own, and the server adds them as they are."""
    text = f"""
        [training]
        optimizer = "{optimizer}"
        head_optimizer = "{optimizer}"
        [privacy]
        mode = "{mode}"
    """
    config = chosen(text)
    training, server = config.training, config.server
    local = 1.0 if optimizer == "sgd" else {"record": 1e-3, "none": 2e-3}[mode]
    assert (training.learning_rate, training.head_learning_rate) == (local, local)
    if optimizer == "adamw":
        assert (server.learning_rate, server.head_learning_rate) == (1.0, 1.0)
    else:
        assert 0 < server.learning_rate <= 10
        assert server.head_optimizer == {"record": "none", "none": "adam"}[mode]
        assert 1 < server.head_learning_rate < 40 or server.head_learning_rate == 0.03


def test_a_head_that_nothing_clips_is_thrown_about_by_no_rule() -> None:
    """Full steps on features of length 10 whose mean is most of them, two classes and 77."""
    server = chosen('[privacy]\nmode = "none"').server
    assert (server.head_optimizer, server.head_learning_rate) == ("adam", 0.03)
    optimizer = ServerOptimizer("adam", 0.03, server.momentum, server.beta2)
    rng = np.random.default_rng(0)
    for classes in (2, 77):
        targets = rng.integers(0, classes, 600)
        features = 3 + rng.normal(0, 1, (600, 32)) + rng.normal(0, 2, (classes, 32))[targets]
        features *= 10 / np.linalg.norm(features, axis=1, keepdims=True)
        head, memory, worst = np.zeros((classes, 32)), ServerState({}, {}), math.log(classes)
        for step in range(30):
            scores = features @ head.T
            chances = np.exp(scores - scores.max(axis=1, keepdims=True))
            chances /= chances.sum(axis=1, keepdims=True)
            loss = float(-np.log(chances[np.arange(600), targets]).mean())
            assert loss < 1.2 * worst, (classes, step)
            slope = (chances - np.eye(classes)[targets]).T @ features / 600
            moved, memory = optimizer.step(memory, -slope.ravel())
            head += server.head_learning_rate * (1 - step / 30) * moved.reshape(head.shape)
        assert loss < 0.3 * worst


@pytest.mark.parametrize(
    "model", ['pooling = "default"', 'task = "token-classification"'], ids=("own head", "words")
)
def test_a_new_head_and_tags_have_as_many_steps_as_they_take(model: str) -> None:
    text = f'[model]\n{model}\n[privacy]\nmode = "none"'
    few, many = (chosen(text, PublicFacts(units, 3)) for units in (590, 400_000))
    rounds = few.federation.rounds - few.training.head_rounds
    assert rounds * few.training.steps == 300
    assert rounds * many.training.steps * many.training.sampling_rate >= 2.9
    language = chosen('[model]\ntask = "causal-lm"\n[privacy]\nmode = "none"', PublicFacts(590, 0))
    assert language.federation.rounds * language.training.steps < 100  # its scores are there


def test_plain_steps_of_a_head_that_nothing_clips_are_small() -> None:
    server = chosen('[privacy]\nmode = "none"\n[server]\nhead_optimizer = "none"').server
    assert (server.head_optimizer, server.head_learning_rate) == ("none", 1.0)


def test_a_head_of_words_has_a_phase_of_its_own() -> None:
    config = chosen('[model]\ntask = "token-classification"')
    assert (config.model.pooling, config.training.head_rounds) == ("words", 30)
    assert (config.training.moves, config.federation.rounds) == ("lora", 90)


def test_a_head_of_the_bases_own_has_no_phase_unless_it_is_asked_for() -> None:
    own = '[model]\npooling = "default"\n'
    assert chosen(own).training.head_rounds == 0
    assert chosen(own + "[training]\nhead_rounds = 4").training.head_rounds == 4


def test_a_language_model_has_no_head_phase() -> None:
    text = '[model]\ntask = "causal-lm"\n[data]\nresponse = "answer"'
    config = chosen(text, PublicFacts(5_000, 0))
    assert (config.model.pooling, config.training.head_rounds) == ("default", 0)
    assert config.training.moves == "both"


def test_a_coordinator_states_how_many_units_there_are() -> None:
    nothing = PublicFacts(0, 3)
    with pytest.raises(BadInput, match=r'\[federation\] units = "auto": expected about how many'):
        chosen("", nothing)
    stated = chosen("[federation]\nunits = 5000", nothing)
    assert stated.training.head_expected_units == 500
    meant = chosen("[training]\nexpected_units = 20\nsampling_rate = 0.1", nothing)
    assert meant.federation.units == 2_000


def test_what_is_chosen_and_given_must_fit() -> None:
    with pytest.raises(BadInput, match=r"head_rounds = 9: expected at most"):
        chosen("[federation]\nrounds = 5\n[training]\nhead_rounds = 9")


SHARED = '[privacy]\nnoise = "shared"\nepsilon = 8.0\n[aggregation]\nsecure = true\n'


@pytest.mark.parametrize(
    ("text", "rounds"),
    [
        ("", 30),  # ten institutions, each with the whole noise
        (SHARED, 90),
        ("[federation]\nclients = 1", 90),
        ('[training]\nmoves = "lora"', 90),  # asked for
        ("[privacy]\nhead_clip = 1.0", 90),
        ("[training]\nsampling_rate = 1.0\n[privacy]\nepsilon = 8.0", 90),  # half the noise
        ("[privacy]\nepsilon = 8.0\nclip = 5.0", 90),
        (SHARED + "[training]\nsampling_rate = 0.02", 30),
        ("[privacy]\nhead_epsilon_share = 1.0", 30),
        ("[federation]\nrounds = 40", 40),
        ('[privacy]\nmode = "none"', 90),
    ],
)
def test_above_a_start_lora_has_rounds_where_noise_leaves_a_signal(text: str, rounds: int) -> None:
    facts = PublicFacts(59_000, 2, 4_000)
    config = chosen(text, facts)
    assert config.training.public_epochs == 3 and config.federation.rounds == rounds
    lora = rounds > config.training.head_rounds
    assert lora == (rounds == 90)
    bare = chosen(text, PublicFacts(59_000, 2, 0))
    assert bare.federation.rounds == (40 if rounds == 40 else 90)
    if lora and not any(each in text for each in ("none", "\nclip")):
        assert (config.privacy.clip, config.server.learning_rate) == (12.0, 5e-4)
        assert (bare.privacy.clip, bare.server.learning_rate) == (3.0, 2e-3)


FEW = PublicFacts(10_000, 77)


@pytest.mark.parametrize(
    ("text", "facts", "rounds"),
    [
        ("", FEW, 30),
        ("", PublicFacts(592, 3), 30),
        ('[model]\ntask = "token-classification"', PublicFacts(400, 3), 30),
        ("", PublicFacts(2_000, 4), 90),
        ('[training]\nmoves = "lora"', FEW, 90),  # asked for
        ("[privacy]\nhead_clip = 1.0", FEW, 90),
        ("[federation]\nclients = 1", FEW, 90),  # its noise is a third of ten institutions'
        (SHARED, FEW, 90),
        ("[federation]\nrounds = 40", FEW, 40),
        ('[privacy]\nmode = "none"', FEW, 90),
        ('[privacy]\nmode = "client"\n[aggregation]\nsecure = true', FEW, 40),
    ],
)
def test_of_few_units_a_class_the_head_alone_has_all_rounds(
    text: str, facts: PublicFacts, rounds: int
) -> None:
    config = chosen(text, facts)
    assert config.federation.rounds == rounds
    alone = rounds == 30 or "rounds" in text
    assert (config.training.head_rounds == rounds) == alone


@pytest.mark.parametrize(
    ("text", "classes", "learnable", "epochs"),
    [
        ("", 2, 800, 3),
        ("", 2, 799, 0),
        ("", 77, 1_010, 0),
        ("", 1, 100_000, 0),  # a language model's words, or a number
        ('[model]\ntask = "multi-label"', 4, 100_000, 0),
        ('[privacy]\nmode = "none"', 2, 1_010, 3),
        ("[model]\nprojection = 64", 2, 1_010, 3),
        ("[training]\npublic_epochs = 7", 77, 10, 7),
    ],
)
def test_a_run_starts_from_public_records_where_there_are_enough(
    text: str, classes: int, learnable: int, epochs: int
) -> None:
    assert chosen(text, PublicFacts(10_000, classes, learnable)).training.public_epochs == epochs
