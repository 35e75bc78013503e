"""The average of a phase's last states: it carries less of their noise than the last one alone."""

from __future__ import annotations

import numpy as np

from fedlora.common.model.state import AdapterState
from fedlora.server.strategies.fedavg import kept, remembered
from fedlora.server.strategies.strategy import ServerState


def add_to_average(state: AdapterState, memory: ServerState) -> tuple[AdapterState, ServerState]:
    """The mean of this state and all added since the phase's averaging began; and the memory."""
    count = memory.counts.get("averaged", 0)
    before = remembered(memory, "average", state.vector)
    average = before + (state.vector - before) / (count + 1)
    vectors = kept(memory, average=average).vectors
    counted = ServerState(vectors, {**memory.counts, "averaged": count + 1})
    return AdapterState(state.spec, average.astype(np.float32)), counted
