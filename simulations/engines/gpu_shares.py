"""What each of Ray's workers asks of its cluster: a processor and, on GPUs, a share of one.

Ray shows a worker the GPU that it has its share of, and no other. Workers that asked for none would
all compute on the first GPU of their machine, and on machines that have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedlora.common.errors import BadInput
from fedlora.common.model.machine import device_named
from fedlora.simulations.options import Options

FINEST = 10_000  # Ray counts in such parts of a GPU
Resources = Mapping[str, float]  # of a machine in the cluster, as Ray names them


def on_gpus(options: Options) -> bool:
    """Whether workers compute on GPUs: where the process that starts them does."""
    return device_named(options.device).type == "cuda"


def check_gpu_share(options: Options) -> None:
    """BadInput for a share that no worker of this run could have."""
    share = options.gpu_share
    if share == 0:
        return
    if not 1 / FINEST <= share <= 1:
        raise BadInput(f"--gpu-share: found {share}, expected {1 / FINEST} to 1 of a GPU")
    if options.engine != "ray":
        raise BadInput(
            f"--gpu-share: found the engine {options.engine}, expected --engine ray: it has workers"
        )
    if not on_gpus(options):
        raise BadInput(
            "--gpu-share: found a run that computes on the CPU, expected a GPU where it is started"
        )


def asked_of_cluster(share: float, clients: int, machines: Sequence[Resources]) -> dict[str, float]:
    """What each worker of a run on the GPUs of these machines asks for, as Flower names it.

    A share of 0 is chosen: as many workers as there are processors beside GPUs, but no more than
    clients, divided over the GPUs. Where Ray knows of no GPU none is asked for. BadInput for a
    share that no machine has.
    """
    fitting = [
        each
        for each in machines
        if each.get("CPU", 0) >= 1 and each.get("GPU", 0) >= (share or 1 / FINEST)
    ]
    if share and not fitting:
        raise BadInput(
            f"--gpu-share {share:g}: found no machine that has it, expected a GPU that the Ray"
            " cluster knows of"
        )
    if not fitting:
        return {"num_cpus": 1}
    workers = min(clients, sum(int(each["CPU"]) for each in fitting))
    beside = math.ceil(workers / max(1, int(sum(each["GPU"] for each in fitting))))
    return {"num_cpus": 1, "num_gpus": share or math.floor(FINEST / beside) / FINEST}
