"""A loaded run keeps a model only once it is the manifest's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.client.service.loaded_run import LoadedRun
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import Network
from fedlora.common.model.base import base_digest
from fedlora.common.model.projection import Affine, Projection
from tests.client.institution import POLICY, Institution, manifest_of


def test_a_forged_projection_spoils_no_later_one(tmp_path: Path, tiny_bert: Path) -> None:
    width = json.loads((tiny_bert / "config.json").read_text())["hidden_size"]
    forged, right = (
        Projection(Affine(np.full((width, 2), value, np.float32), np.zeros(2, np.float32)))
        for value in (1, 2)
    )
    forged.write(tmp_path / "forged")
    right.write(tmp_path / "right")
    north = Institution(tmp_path / "n")
    north.set_policy(POLICY.format(base=base_digest(tiny_bert), folder=tiny_bert))
    rows = [json.dumps({"text": f"w{k} good", "label": "ab"[k % 2]}) for k in range(8)]
    (north.root / "notes.jsonl").write_text("\n".join(rows))
    network = Network.of(replace(ModelConfig(pooling="mean"), projection=2), LoraConfig(rank=2))
    run = manifest_of(
        base_digest=base_digest(tiny_bert), projection_digest=right.digest, network=network
    )
    loaded = LoadedRun(north.folder, north.folder.load_policy(), north.ledger)
    for _ in range(2):
        with pytest.raises(BadInput, match="projection_digest"):
            loaded.prepare(run, tmp_path / "forged")
    model = loaded.prepare(run, tmp_path / "right").training.gradients.model
    assert model.projection is not None and model.projection.digest == right.digest
