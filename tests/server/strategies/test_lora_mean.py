"""What a mean of LoRA's factors is worth (docs/aggregation.md): the gradients here are known.

Client i has ½ ‖B A Xᵢ - Yᵢ‖²; an update is what SGD moved A and B by.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.server.strategies.fedavg import FedAvg, ServerOptimizer
from fedlora.server.strategies.flexlora import mean_of_products
from fedlora.server.strategies.strategy import ServerState
from tests.oracles import mean_of_dense_products, product_of_means

RANK, WIDTH, CLIENTS, RATE = 2, 6, 5, 0.02
SPEC = AdapterSpec(
    (TensorSpec("q.lora_A.weight", (RANK, WIDTH)), TensorSpec("q.lora_B.weight", (WIDTH, RANK)))
)
Floats = npt.NDArray[np.float64]
DRAW = np.random.default_rng(3)
A, B = DRAW.normal(size=(RANK, WIDTH)), DRAW.normal(size=(WIDTH, RANK))
DATA = DRAW.normal(size=(CLIENTS, 2, WIDTH, 9))


def flat(a: Floats, b: Floats) -> Floats:
    return np.concatenate([a.ravel(), b.ravel()])


def factors(vector: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
    a, b = np.split(np.asarray(vector, dtype=np.float64), [A.size])
    return a.reshape(A.shape), b.reshape(B.shape)


def gradient(a: Floats, b: Floats, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    left = b @ a @ x - y
    return b.T @ left @ x.T, left @ (a @ x).T


def trained(
    client: int,
    steps: int,
    frozen: bool,
    start: tuple[Floats, Floats] = (A, B),
    moves: str = "AB",
    rate: float = RATE,
) -> Floats:
    """The update of a client after `steps` of SGD."""
    a, b = start
    for _ in range(steps):
        of_a, of_b = gradient(a, b, *DATA[client])
        a = a - rate * of_a * (not frozen and "A" in moves)
        b = b - rate * of_b * ("B" in moves)
    return flat(a - start[0], b - start[1])


def averaged(steps: int, frozen: bool) -> tuple[Floats, Floats]:
    updates = [trained(client, steps, frozen) for client in range(CLIENTS)]
    state = AdapterState(SPEC, flat(A, B).astype(np.float32))
    strategy = FedAvg(ServerOptimizer("none", 1.0, 0.9, 0.99))
    after, _ = strategy.apply(state, ServerState(), np.mean(updates, axis=0))
    return factors(after.vector)


def error(steps: int, frozen: bool) -> float:
    """How far the product of the means is from the mean of the products, beside the latter."""
    a, b = averaged(steps, frozen)
    products = []
    for client in range(CLIENTS):
        moved = trained(client, steps, frozen)
        da, db = factors(moved)
        products.append((B + db) @ (A + da))
    mean = np.mean(products, axis=0)
    return float(np.linalg.norm(b @ a - mean) / np.linalg.norm(mean))


@pytest.mark.parametrize("steps", [1, 5])
def test_with_a_frozen_the_mean_of_b_is_exact_for_any_number_of_steps(steps: int) -> None:
    assert error(steps, frozen=True) < 1e-5


def test_the_mean_of_both_is_not() -> None:
    assert error(5, frozen=False) > 1e-2


def test_by_turns_every_round_is_exact_for_any_number_of_steps() -> None:
    """RoLoRA, six rounds of five steps: both halves move, and no round is off the mean."""
    start = (A, np.zeros_like(B))
    strategy = FedAvg(ServerOptimizer("none", 1.0, 0.9, 0.99))
    for number in range(6):
        half = "BA"[number % 2]
        updates = [trained(k, 5, False, start, half, RATE / 10) for k in range(CLIENTS)]
        state = AdapterState(SPEC, flat(*start).astype(np.float32))
        after, _ = strategy.apply(state, ServerState(), np.mean(updates, axis=0))
        moved = [factors(flat(*start) + update) for update in updates]
        a, b = factors(after.vector)
        mean = mean_of_dense_products(moved)
        assert np.linalg.norm(b @ a - mean) < 1e-5 * np.linalg.norm(mean)
        start = a, b
    assert np.linalg.norm(start[0] - A) > 1e-3 and start[1].any()


def test_flexlora_is_nearer_to_the_mean_than_the_means_are() -> None:
    """Five steps: as near as a product of the rank gets, with the rest of its singular values."""
    updates = np.array([trained(client, 5, False) for client in range(CLIENTS)])
    state = AdapterState(SPEC, flat(A, B).astype(np.float32))
    moved = [factors(state.vector + update) for update in updates]
    mean = mean_of_dense_products(moved)
    update = np.zeros(SPEC.size)
    mean_of_products(state, [*updates], update)
    a, b = factors(state.vector + update)
    found, plain = (np.linalg.norm(product - mean) for product in (b @ a, product_of_means(moved)))
    rest = np.linalg.svd(mean, compute_uv=False)[RANK:]
    assert found == pytest.approx(np.linalg.norm(rest), rel=1e-5)
    assert 0 < found < 0.8 * plain


def test_one_step_each_is_one_central_step_on_all_records() -> None:
    central = np.mean([flat(*gradient(A, B, *DATA[client])) for client in range(CLIENTS)], axis=0)
    np.testing.assert_allclose(
        flat(*averaged(1, frozen=False)), flat(A, B) - RATE * central, rtol=1e-5, atol=1e-6
    )
