"""What a mean of LoRA's factors is worth (docs/aggregation.md): the gradients here are known.

Client i has ½ ‖B A Xᵢ - Yᵢ‖²; an update is what SGD moved A and B by.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.server.strategies.fedavg import FedAvg
from fedlora.server.strategies.optimizers import ServerOptimizer
from fedlora.server.strategies.strategy import ServerState

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


def trained(client: int, steps: int, frozen: bool) -> Floats:
    """The update of a client after `steps` of SGD."""
    a, b = A.copy(), B.copy()
    for _ in range(steps):
        of_a, of_b = gradient(a, b, *DATA[client])
        a, b = a - RATE * of_a * (not frozen), b - RATE * of_b
    return flat(a - A, b - B)


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


def test_one_step_each_is_one_central_step_on_all_records() -> None:
    central = np.mean([flat(*gradient(A, B, *DATA[client])) for client in range(CLIENTS)], axis=0)
    np.testing.assert_allclose(
        flat(*averaged(1, frozen=False)), flat(A, B) - RATE * central, rtol=1e-5, atol=1e-6
    )
