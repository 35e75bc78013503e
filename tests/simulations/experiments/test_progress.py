"""What a person watches while a federation runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedlora.common.errors import BadInput
from fedlora.simulations.experiments.progress import run_progress


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_never_began_leaves_no_bar_before_its_error(begun: bool) -> None:
    out = io.StringIO()
    with pytest.raises(BadInput), run_progress(Console(file=out, width=80)) as bars:
        if begun:
            bars.round(1, {"rounds": 3})
        raise BadInput("no")
    assert ("rounds" in out.getvalue()) == begun
