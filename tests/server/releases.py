"""A small release to take apart: two institutions, a manifest, and files in the adapter's place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedlora.common.adapter.released import Description, write_description
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import Started, reply_to_bytes
from fedlora.common.trust.identity import Identity, seal
from fedlora.server.coordinator.folder import Directory
from fedlora.server.release.export import export
from fedlora.server.release.layout import REPORT_TAG, Institution, Release
from fedlora.server.rounds.checkpoint import Checkpoint, Progress

BASE = "sha256:" + "1" * 64
SPEC = AdapterSpec(
    (TensorSpec("base.query.lora_A.weight", (2, 4)), TensorSpec("head.weight", (2, 4)))
)
STATE = AdapterState(SPEC, np.linspace(-1, 1, SPEC.size, dtype=np.float32))


@dataclass(frozen=True)
class Party:
    coordinator: Identity
    members: Mapping[str, Identity]


def party() -> Party:
    return Party(Identity.generate(), {name: Identity.generate() for name in ("north", "south")})


def manifest(mode: str = "record", run: str = "r1") -> RunManifest:
    phase = Phase("adapter", 3, 4, 1, 0.1, 64.0, 1.2, 0.5, 0.0, "sgd", 1.0, False, 0.0)
    return RunManifest(
        federation="bank-intents",
        run=run,
        task="sequence-classification",
        labels=("card", "loan"),
        base_digest=BASE,
        spec_digest=SPEC.digest,
        projection_digest="",
        max_length=64,
        mode=mode,
        unit="",
        epsilon=3.0 if mode != "none" else 0.0,
        delta=1e-5 if mode != "none" else 0.0,
        strategy="fedavg",
        participation=1.0,
        minimum_cohort=2,
        seed=7,
        network=Network.of(ModelConfig(pooling="mean"), LoraConfig(targets=("query", "value"))),
        phases=(phase,),
    )


@cache
def cost(of: RunManifest) -> float:
    return guarantee_of(of).charged_epsilon() if of.mode != "none" else 0.0


def consent(who: Identity, name: str, of: RunManifest, epsilon: float | None = None) -> bytes:
    """What `name` signs of its reservation: by default at what the schedule costs."""
    spent = cost(of) if epsilon is None else epsilon
    statement = Started(name, of.digest, "sha256:" + "3" * 64, spent, of.delta, "sha256:s")
    return reply_to_bytes(who, of.federation, statement)


def release(of: Party, run: RunManifest | None = None) -> Release:
    found = run or manifest()
    return Release(
        manifest=found,
        institutions={
            n: Institution(f"{n} | <b>clinic</b>", each.public) for n, each in of.members.items()
        },
        statements={name: consent(each, name, found) for name, each in of.members.items()},
        adapter=STATE.digest,
        figures={"accuracy": 0.8123, "rounds": 3},
        reports={"north": seal(of.members["north"], REPORT_TAG, {"institution": "north"})},
    )


def described(run: RunManifest, state: AdapterState = STATE) -> Description:
    names = {"task", "labels", "base_digest", "max_length", "projection_digest", "seed"}
    own = {name: getattr(run, name) for name in names}
    shared = {
        f.name: getattr(run.network, f.name)
        for f in fields(Network)
        if f.name in {each.name for each in fields(Description)}
    }
    targets = tuple(sorted(run.network.targets))
    return Description(
        **(own | shared | {"base": "b", "adapter_digest": state.digest, "targets": targets})
    )


def peft_config(of: Description) -> dict[str, object]:
    """What PEFT writes, but for the keys that are null, false or empty."""
    return {
        "base_model_name_or_path": of.base_digest if "/" in of.base else of.base,
        "bias": "none",
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "r": of.rank,
        "lora_alpha": of.alpha,
        "target_modules": of.targets,
        "layers_to_transform": of.layers or None,
    }


def adapter(folder: Path, state: AdapterState = STATE, **changes: object) -> Path:
    """The files that `export_adapter` writes, for a network of two tensors.

    `changes` are to its description.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = replace(described(manifest(), state), **changes)  # type: ignore[arg-type]
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(description)))
    for name, part in (("adapter_model", "base."), ("head", "head.")):
        named = {
            key: np.array(value) for key, value in state.named().items() if key.startswith(part)
        }
        save_file(named, folder / f"{name}.safetensors")
    write_description(folder, description, state.spec)
    return folder


def exported(folder: Path, of: Party) -> Path:
    export(folder / "export", of.coordinator, release(of), adapter(folder / "adapter"))
    return folder / "export"


def finished_run(directory: Directory, members: Mapping[str, Identity]) -> None:
    """What the round loop leaves."""
    run, found = directory.new_run(), manifest()
    Checkpoint.create(run / "checkpoint", found, AdapterState.zeros(SPEC)).commit(
        Progress(3, STATE, STATE)
    )
    (run / "consents").mkdir()
    for name, identity in members.items():
        (run / "consents" / f"{name}.started").write_bytes(consent(identity, name, found))
    (run / "summary.json").write_text(json.dumps({"accuracy": 0.5}))
    adapter(run / "adapter")
