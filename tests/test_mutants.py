"""Secure aggregation's tests notice each check missing, turned or widened: `make mutants`."""

from __future__ import annotations

import pytest

from tests.mutants_secagg import MUTANTS, ROOT, survivors


def test_mutants_are_at_their_place() -> None:
    assert len(MUTANTS) >= 20
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.found) == 1, mutant.name
        compile(text.replace(mutant.found, mutant.put), mutant.file, "exec")


@pytest.mark.chaos
def test_no_mutant_survives() -> None:
    assert survivors() == []
