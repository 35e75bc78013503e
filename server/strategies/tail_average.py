"""The average of a phase's last states: it carries less of their noise than the last one alone."""

from __future__ import annotations

import numpy as np

from fedlora.common.disk.mapped import alike, by_stretches
from fedlora.common.model.state import AdapterState
from fedlora.server.strategies.strategy import ServerState


def add_to_average(state: AdapterState, memory: ServerState) -> tuple[AdapterState, ServerState]:
    """The mean of this state and all added since the phase's averaging began; and the memory."""
    count = memory.counts.get("averaged", 0)
    average = alike(state.vector, np.float32)
    before = memory.vectors.get("average", average)  # of none yet, 0
    for mean, now, out in by_stretches(before, state.vector, average):
        wide = mean.astype(np.float64)
        out[:] = wide + (now - wide) / (count + 1)
    vectors = {**memory.vectors, "average": average}
    counted = ServerState(vectors, {**memory.counts, "averaged": count + 1})
    return AdapterState(state.spec, average), counted
