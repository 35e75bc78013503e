"""How few updates make a round: what institutions were promised, what a strategy can judge."""

from __future__ import annotations

import pytest

from fedlora.common.config.schema import AggregationConfig, FederationConfig, ServerConfig
from fedlora.server.runs.run import rules_of
from tests.server.fakes import manifest_of


@pytest.mark.parametrize(
    ("strategy", "hostile", "minimum"),
    [("fedavg", 4, 1), ("median", 2, 5), ("norm-filter", 1, 3), ("multi-krum", 2, 7)],
)
def test_a_round_needs_as_many_updates_as_its_strategy(
    strategy: str, hostile: int, minimum: int
) -> None:
    asked = AggregationConfig(strategy=strategy, hostile=hostile)
    rules = rules_of(FederationConfig(), ServerConfig(), asked, manifest_of(2, 2))
    assert rules.minimum == minimum
