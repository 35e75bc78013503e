"""Server optimisers and tail averaging, against slow references that keep the whole history."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.errors import BadInput
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.server.strategies import fedavg
from fedlora.server.strategies.fedavg import RULES, FedAvg, RateSchedule, ServerOptimizer
from fedlora.server.strategies.strategy import ServerState
from fedlora.server.strategies.tail_average import add_to_average
from tests.oracles import server_states

values = st.floats(-100, 100, width=32)
histories = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.lists(values, min_size=size, max_size=size), min_size=1, max_size=8)
)


def state_of(vector: list[float]) -> AdapterState:
    spec = AdapterSpec((TensorSpec("lora", (len(vector),)),))
    return AdapterState(spec, np.array(vector, dtype=np.float32))


def share_of(done: int, warmup: int, decay: int) -> float:
    """Up to 1 in `warmup` steps, then down to 0 at `decay`."""
    if done < warmup:
        return (done + 1) / (warmup + 1)
    return max(0, decay - done) / (decay - warmup) if decay > warmup else float(decay == 0)


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None)
@given(
    history=histories,
    rate=st.floats(1e-3, 2),
    beta1=st.floats(0, 0.99),
    decay=st.integers(0, 9),
    warmup=st.integers(0, 3),
    # below, Yogi's second moment is a difference of almost equal squares
    beta2=st.floats(0.5, 0.999),
)
def test_every_optimizer_is_the_paper_s(
    name: str,
    history: list[list[float]],
    rate: float,
    beta1: float,
    beta2: float,
    decay: int,
    warmup: int,
) -> None:
    start, means = history[0], history[1:]
    strategy = FedAvg(ServerOptimizer(name, rate, beta1, beta2), RateSchedule(warmup, decay))
    state, memory = state_of(start), ServerState()
    rates = [rate * share_of(done, warmup, decay) for done in range(len(means))]
    reference = server_states(name, rates, beta1, beta2, start, means)
    tolerance = 1e-6 * float(np.abs([start, *reference]).max()) + 1e-9
    for mean, expected in zip(means, reference, strict=True):
        state, memory = strategy.apply(state, memory, np.array(mean))
        np.testing.assert_allclose(state.vector, expected, rtol=0, atol=tolerance)
        assert state.vector.dtype == np.float32
        assert all(vector.dtype == np.float32 for vector in memory.vectors.values())


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=5), st.lists(values, min_size=5, max_size=5))
def test_plain_fedavg_at_rate_one_adds_the_mean(start: list[float], mean: list[float]) -> None:
    delta = np.array(mean[: len(start)])
    found, memory = FedAvg(ServerOptimizer("none", 1.0, 0.9, 0.99)).apply(
        state_of(start), ServerState(), delta
    )
    np.testing.assert_array_equal(found.vector, (np.array(start) + delta).astype(np.float32))
    assert not memory.vectors


@pytest.mark.parametrize("name", RULES)
def test_a_step_by_stretches_is_the_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = np.random.default_rng(3), list[list[bytes]]()
    means = [source.normal(size=20) for _ in range(3)]
    strategy, spec = (
        FedAvg(ServerOptimizer(name, 0.3, 0.9, 0.99)),
        AdapterSpec((TensorSpec("lora.a", (20,)),)),
    )
    for stretch in (1 << 20, 7):
        monkeypatch.setattr(fedavg, "STRETCH", stretch)
        kept = np.ones(20, dtype=np.float32)
        state, memory = AdapterState.zeros(spec), ServerState({"average": kept}, {"averaged": 1})
        for mean in means:
            state, memory = strategy.apply(state, memory, mean)
        assert memory.vectors["average"] is kept and memory.counts["steps"] == 3
        vectors = [state.vector, *(memory.vectors[each] for each in sorted(memory.vectors))]
        found.append([each.tobytes() for each in vectors])
    assert found[0] == found[1]


def test_a_falling_rate_falls_linearly_and_takes_its_last_step_above_zero() -> None:
    strategy = FedAvg(ServerOptimizer("none", 1.0, 0.9, 0.99), RateSchedule(decay=4))
    state, memory, moved = state_of([0.0]), ServerState(), [0.0]
    for _ in range(6):
        state, memory = strategy.apply(state, memory, np.array([1.0]))
        moved.append(float(state.vector[0]))
    np.testing.assert_allclose(np.diff(moved), [1, 0.75, 0.5, 0.25, 0, 0])


def test_a_rate_rises_before_it_falls() -> None:
    schedule = RateSchedule(warmup=2, decay=6)
    found = [schedule.share(done) for done in range(8)]
    np.testing.assert_allclose(found, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0, 0])
    assert [RateSchedule(warmup=1).share(done) for done in range(3)] == [0.5, 1.0, 1.0]
    assert all(0 <= RateSchedule(9, 4).share(done) <= 1 for done in range(12))


@pytest.mark.parametrize(
    ("name", "steps"), [("none", 10.0), ("momentum", sum(1 - 0.9**k for k in range(1, 11)) * 10)]
)
def test_a_constant_update_moves_by_the_closed_form(name: str, steps: float) -> None:
    strategy, state, memory = (
        FedAvg(ServerOptimizer(name, 0.5, 0.9, 0.99)),
        state_of([0.0]),
        ServerState(),
    )
    for _ in range(10):
        state, memory = strategy.apply(state, memory, np.array([2.0]))
    np.testing.assert_allclose(state.vector, [0.5 * 2.0 * steps], rtol=1e-6)


@settings(deadline=None)
@given(histories)
def test_the_running_average_is_the_mean_of_all_that_were_added(history: list[list[float]]) -> None:
    memory = ServerState({"velocity": np.ones(len(history[0]), dtype=np.float32)}, {"other": 3})
    for count, vector in enumerate(history, start=1):
        average, memory = add_to_average(state_of(vector), memory)
        expected = np.mean(np.array(history[:count], dtype=np.float32).astype(np.float64), axis=0)
        np.testing.assert_allclose(average.vector, expected, rtol=1e-5, atol=1e-4)
        assert memory.counts == {"other": 3, "averaged": count}
        np.testing.assert_array_equal(memory.vectors["velocity"], 1.0)


@settings(deadline=None)
@given(histories)
def test_nothing_that_is_passed_in_is_changed(history: list[list[float]]) -> None:
    vectors = {
        name: np.ones(len(history[0]), dtype=np.float32) for name in ("velocity", "first", "second")
    }
    memory, state = ServerState(vectors), state_of(history[0])
    before = state.digest
    for name in RULES:
        FedAvg(ServerOptimizer(name, 1.0, 0.9, 0.99)).apply(state, memory, np.array(history[-1]))
    add_to_average(state, memory)
    assert state.digest == before
    assert memory.vectors.keys() == vectors.keys()
    assert all((vector == 1).all() for vector in memory.vectors.values())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "adamm"}, "optimizer: found 'adamm', expected one of none, momentum, adam, yogi"),
        ({"learning_rate": float("nan")}, "learning_rate: found nan, expected a finite number > 0"),
        ({"learning_rate": 0.0}, "learning_rate: found 0.0"),
        ({"momentum": 1.0}, "momentum: found 1.0, expected 0 <= momentum < 1"),
        ({"beta2": float("nan")}, "beta2: found nan"),
    ],
)
def test_a_bad_optimizer_is_refused_before_anything_is_spent(
    changes: dict[str, object], fault: str
) -> None:
    good: dict[str, object] = {"name": "adam", "learning_rate": 1.0, "momentum": 0.9, "beta2": 0.99}
    with pytest.raises(BadInput, match=fault):
        ServerOptimizer(**{**good, **changes})  # type: ignore[arg-type]


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(BadInput) as error:
        ServerOptimizer("sgd", -1.0, 2.0, -0.5)
    assert len(error.value.faults) == 4
