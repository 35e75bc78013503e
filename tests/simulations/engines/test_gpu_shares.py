"""Which share of a GPU a worker asks for; on a cluster of pretended ones: test_ray.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.common.config.load import load_config
from fedlora.common.errors import BadInput
from fedlora.simulations.engines import gpu_shares, ray
from fedlora.simulations.engines.gpu_shares import asked_of_cluster, check_gpu_share
from fedlora.simulations.experiments.simulate import simulate
from fedlora.simulations.federation.packaged import packaged_config
from fedlora.simulations.options import Options

ONE = {"CPU": 16.0, "GPU": 1.0}
EIGHT = {"CPU": 64.0, "GPU": 8.0}
NO_GPU = {"CPU": 32.0, "memory": 1e9}
NO_CPU = {"GPU": 1.0}


@pytest.mark.parametrize(
    ("machines", "clients", "share", "workers"),
    [
        ([ONE], 100, 0.0625, 16),  # as many workers as processors
        ([ONE], 3, 0.3333, 3),  # or as clients
        ([ONE], 1, 1.0, 1),
        ([EIGHT], 8, 1.0, 8),
        ([EIGHT], 9, 0.5, 16),  # two on each GPU, so that nobody waits
        ([EIGHT], 2, 1.0, 8),
        ([ONE, EIGHT], 100, 0.1111, 9 + 64),  # nine on each GPU, as far as processors go
        ([ONE, NO_GPU, NO_CPU, {}], 100, 0.0625, 16),  # workers go where both are
    ],
)
def test_gpus_are_divided_over_the_workers(
    machines: list[dict[str, float]], clients: int, share: float, workers: int
) -> None:
    asked = asked_of_cluster(0, clients, machines)
    assert asked == {"num_cpus": 1, "num_gpus": share}
    # how many Flower then starts
    room = [min(each.get("CPU", 0), each.get("GPU", 0) // share) for each in machines]
    assert sum(room) == workers


def test_a_share_that_is_asked_for_is_asked_for() -> None:
    assert asked_of_cluster(0.25, 100, [NO_GPU, ONE]) == {"num_cpus": 1, "num_gpus": 0.25}


def test_where_ray_knows_of_no_gpu_none_is_asked_for() -> None:
    """Every worker sees what its machine has, as before."""
    assert asked_of_cluster(0, 100, [NO_GPU, NO_CPU]) == {"num_cpus": 1}
    for machines in ([], [NO_GPU], [NO_CPU], [{"CPU": 1.0, "GPU": 0.0}]):
        with pytest.raises(BadInput, match=r"--gpu-share 0\.5: found no machine that has it"):
            asked_of_cluster(0.5, 100, machines)


@pytest.mark.parametrize("share", [-1.0, 1.5, 0.00009, float("nan"), float("inf")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(BadInput, match=r"--gpu-share: found \S+, expected 0.0001 to 1 of a GPU"):
        check_gpu_share(Options(engine="ray", gpu_share=share))


def test_a_share_without_workers_or_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="found the engine sequential, expected --engine ray"):
        check_gpu_share(Options(gpu_share=0.5))
    on_ray = Options(engine="ray", device="cpu", gpu_share=0.5)
    with pytest.raises(BadInput, match="found a run that computes on the CPU"):
        check_gpu_share(on_ray)
    monkeypatch.setattr(gpu_shares, "on_gpus", lambda options: True)
    check_gpu_share(on_ray)


def test_what_no_machine_has_is_said_before_anything_is_charged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(options: Options, clients: int) -> dict[str, float]:
        return asked_of_cluster(options.gpu_share, clients, [NO_GPU])

    monkeypatch.setattr(gpu_shares, "on_gpus", lambda options: True)
    monkeypatch.setattr(ray, "workers", missing)
    settings, run = load_config(packaged_config(Path("quickstart"))), tmp_path / "run"
    with pytest.raises(BadInput, match="found no machine that has it"):
        simulate(settings, run, Options(engine="ray", device="cpu", gpu_share=0.5))
    assert not [*run.glob("*.sqlite")]
