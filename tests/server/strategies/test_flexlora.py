"""FlexLoRA against whole matrices; and what exactness would cost those that are left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.config.load import parse_config
from fedlora.common.config.schema import AggregationConfig
from fedlora.common.errors import BadInput
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.server.defaults.decide import decided
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.server.strategies.flexlora import mean_of_products
from fedlora.server.strategies.gathered import gathering
from tests.oracles import (
    Dense,
    cut_to_rank,
    mean_of_dense_products,
    product_of_means,
    stacked,
    with_residual,
)

FLEXLORA = AggregationConfig(strategy="flexlora")
Shape = tuple[int, int, int]  # out, in, rank


def spec_of(*shapes: Shape) -> AdapterSpec:
    tensors = [TensorSpec("head.weight", (3,))]
    for number, (out, in_, rank) in enumerate(shapes):
        tensors.append(TensorSpec(f"{number}.lora_A.weight", (rank, in_)))
        tensors.append(TensorSpec(f"{number}.lora_B.weight", (out, rank)))
    return AdapterSpec(tuple(tensors))


def factors(spec: AdapterSpec, vector: Dense) -> list[tuple[Dense, Dense]]:
    """(A, B) of each layer."""
    named = {each.name: vector[place].reshape(each.shape) for each, place in spec.slices()}
    count = len(spec.tensors) // 2
    return [(named[f"{k}.lora_A.weight"], named[f"{k}.lora_B.weight"]) for k in range(count)]


def gathered(state: AdapterState, updates: Dense) -> Dense:
    """What the next adapter is."""
    found = gathering(FLEXLORA)(state)
    for update in updates:
        found.add(update.astype(np.float32))
    return state.vector + found.total() / found.count


shapes = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(1, 3))
seeds = st.integers(0, 2**32)


@settings(deadline=None, max_examples=60)
@given(given_=st.lists(shapes, min_size=1, max_size=3), institutions=st.integers(1, 5), seed=seeds)
def test_it_is_the_cut_mean_of_the_products(
    given_: list[Shape], institutions: int, seed: int
) -> None:
    """To 1e-5 of the mean; and never further from it than plain averaging."""
    spec, rng = spec_of(*given_), np.random.default_rng(seed)
    state = AdapterState(spec, rng.normal(size=spec.size).astype(np.float32))
    updates = rng.normal(size=(institutions, spec.size)).astype(np.float32).astype(np.float64)
    after = gathered(state, updates)
    each = [factors(spec, state.vector + update) for update in updates]
    for layer, (a, b) in enumerate(factors(spec, after)):
        moved = [found[layer] for found in each]
        mean = mean_of_dense_products(moved)
        scale = np.linalg.norm(mean)
        assert np.linalg.norm(b @ a - cut_to_rank(mean, len(a))) <= 1e-5 * scale
        plain = np.linalg.norm(product_of_means(moved) - mean)
        assert np.linalg.norm(b @ a - mean) <= plain + 1e-5 * scale
        rows = a @ a.T  # A has rows of length 1: as many as the layer has directions
        count = min(len(a), *mean.shape)
        np.testing.assert_allclose(rows[:count, :count], np.eye(count), atol=1e-6)
    head = spec.head_mask()
    np.testing.assert_allclose(after[head], (state.vector + updates.mean(axis=0))[head], rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(institutions=st.integers(1, 6), rank=st.integers(1, 4), seed=seeds)
def test_it_is_exact_where_the_mean_has_the_rank(institutions: int, rank: int, seed: int) -> None:
    """Institutions whose A spans the same rows, by a basis of their own: plain averaging is off."""
    spec, rng = spec_of((8, 12, rank)), np.random.default_rng(seed)
    state, rows = AdapterState.zeros(spec), rng.normal(size=(rank, 12))
    updates = np.zeros((institutions, spec.size))
    for update in updates:
        turned = rng.normal(size=(rank, rank)) @ rows
        update[3:] = np.concatenate([turned.ravel(), rng.normal(size=8 * rank)])
    ((a, b),) = factors(spec, gathered(state, updates))
    moved = [factors(spec, update)[0] for update in updates]
    mean = mean_of_dense_products(moved)
    assert np.linalg.norm(b @ a - mean) <= 1e-5 * np.linalg.norm(mean)
    if institutions > 1:
        assert np.linalg.norm(product_of_means(moved) - mean) > 1e-3 * np.linalg.norm(mean)


@settings(deadline=None, max_examples=30)
@given(institutions=st.integers(2, 4), rank=st.integers(1, 3), seed=seeds)
def test_exact_rules_need_a_rank_that_no_adapter_of_the_run_has(
    institutions: int, rank: int, seed: int
) -> None:
    """FLoRA's stack has rank n r, and what FedEx-LoRA adds to the base (n - 1) r, each round."""
    rng = np.random.default_rng(seed)
    moved = [
        (rng.normal(size=(rank, 40)), rng.normal(size=(30, rank))) for _ in range(institutions)
    ]
    mean = mean_of_dense_products(moved)
    product, residual = with_residual(moved)
    a, b = stacked(moved)
    for exact in (product + residual, b @ a):
        assert np.linalg.norm(exact - mean) <= 1e-5 * np.linalg.norm(mean)
    assert np.linalg.matrix_rank(mean) == len(a) == institutions * rank
    assert np.linalg.matrix_rank(residual) == (institutions - 1) * rank


def test_where_no_lora_moved_a_round_leaves_its_bits() -> None:
    spec = spec_of((4, 5, 2))
    state = AdapterState(spec, np.linspace(-1, 1, spec.size, dtype=np.float32))
    updates = np.zeros((3, spec.size))
    updates[:, :3] = 1.0
    found = np.zeros(spec.size)
    mean_of_products(state, [*updates], found)
    assert (found[:3] == 1).all() and not found[3:].any()


def test_a_b_of_zero_leaves_an_a_that_learns() -> None:
    """As LoRA begins: no direction dies, whose gradient would be 0 in both halves for ever."""
    spec = spec_of((4, 5, 2))
    updates = np.zeros((3, spec.size))
    updates[:, 3:13] = np.random.default_rng(0).normal(size=(3, 10))  # A alone
    ((a, b),) = factors(spec, gathered(AdapterState.zeros(spec), updates))
    assert np.linalg.norm(b) < 1e-6 and np.linalg.matrix_rank(a) == 2


@pytest.mark.parametrize(
    ("given_", "found"),
    [
        ("[aggregation]\nsecure = true", "secure = false: masks leave but a sum"),
        ('[lora]\nvariant = "ffa"', r'\[lora\] variant = "lora": the mean of one half is exact'),
        ('[lora]\nvariant = "rolora"', r'\[lora\] variant = "lora": the mean of one half'),
        ('[server]\noptimizer = "momentum"', r'\[server\] optimizer = "none": A and B have'),
        ("[server]\nlearning_rate = 0.5", r"\[server\] learning_rate = 1: A and B have"),
        ("[server]\nwarmup = 0.1", r"\[server\] warmup = 0:"),
        ('[server]\ndecay = "linear"', r'\[server\] decay = "none":'),
        ("[server]\naverage_last = 0.2", r"\[server\] average_last = 0:"),
        ('[training]\noptimizer = "adamw"', r"\[training\] carry_optimizer = false:"),
    ],
)
def test_what_cannot_follow_it_is_refused_at_the_start(given_: str, found: str) -> None:
    asked = "strategy = 'flexlora'"
    text = f"[data]\ntrain = 'a'\ntest = 'b'\n{given_}\n"
    text += asked if "[aggregation]" in given_ else f"[aggregation]\n{asked}"
    with pytest.raises(BadInput, match=found):
        parse_config(text)


@pytest.mark.parametrize("mode", ["record", "none"])
def test_what_is_left_open_is_chosen_so_that_it_fits(mode: str) -> None:
    """The server takes what comes as it is; a noised step's rate is the node's."""
    config = parse_config(
        "[data]\ntrain = 'a'\ntest = 'b'\n[aggregation]\nstrategy = 'flexlora'\n"
        f"[privacy]\nmode = '{mode}'\nepsilon = 8.0\n[training]\ncarry_optimizer = false\n"
    )
    found = decided(config, PublicFacts(units=4_000, classes=6))
    server = found.server
    assert (server.optimizer, server.learning_rate, server.warmup, server.decay) == (
        *("none", 1.0, 0.0, "none"),
    )
    assert found.training.learning_rate > 0 and found.training.learning_rate != 1.0
