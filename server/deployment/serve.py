"""A run between real machines: the simulator's round loop over institutions on their own.

    1. who takes part                                       (server.deployment.participants)
    2. in clear: one signed plan an attempt; its exact bytes are on disk before they are sent. A
       reply counts where its institution signed it, for this run, round and attempt, and it is
       finite, of the right shape, and within the public bound on its norm
    3. under masks: one signed request a stage; what comes back is for the state machines of
       server.secagg
    4. all else is the simulator's: the loop, the checkpoint, the strategies, the summary

A `Carrier` takes bytes to members and brings bytes back; Flower's grid is one, the tests have
another.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.common.config.schema import Config, load_config
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.calibration import default_cache
from fedlora.common.protocol.messages import MANIFEST_TAG
from fedlora.common.trust.identity import Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.cohorts import cohort_of
from fedlora.server.deployment.participants import Carrier, Participants
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.runs.metrics import Conducted
from fedlora.server.runs.public_data import PublicSide, forget_beginning, read_public
from fedlora.server.runs.run import conclude, conduct, has_result, to_its_end
from fedlora.server.runs.schedule import make_manifest
from fedlora.server.runs.summary import write_summary


def serve(folder: Path, coordinator: Coordinator, carrier: Carrier) -> dict[str, Any]:
    """Begin the run in `folder`, or go on with it, to its summary; raises what the loop raises.

    A run that ends early leaves its last adapter and its summary all the same: an export tells what
    became of it.
    """
    config = load_config(folder / "config.toml")
    if config.federation.clients < config.aggregation.minimum_cohort:
        raise BadInput(
            f"[federation] clients = {config.federation.clients}: expected at least the "
            f"[aggregation] minimum_cohort = {config.aggregation.minimum_cohort}"
        )
    path = folder / "checkpoint"
    if not (path / "manifest.json").exists():
        # offered to institutions: a new one would be charged anew
        if (folder / "manifest.signed").exists():
            raise BadInput(
                f"{path / 'manifest.json'}: missing, expected that of the run that was begun"
            )
        forget_beginning(folder)
    public = PublicSide.build(config, read_public(config), folder)
    if (path / "manifest.json").exists():
        checkpoint = Checkpoint.open(path, public.model.spec)
    else:
        checkpoint = Checkpoint.create(path, _manifest(config, public, coordinator), public.initial)
    signed = Signed.by(coordinator.identity, MANIFEST_TAG, checkpoint.manifest.to_bytes())
    write_atomically(folder / "manifest.signed", signed.to_bytes())
    federation = config.federation
    who = Participants(
        checkpoint.manifest,
        coordinator,
        carrier,
        folder,
        federation.clients,
        federation.deadline,
        federation.quorum,
    )
    run = Conducted(config, folder, public, checkpoint, "flower")
    progress, ended = to_its_end(checkpoint, lambda: conduct(run, cohort_of(who)))
    if has_result(progress, ended):
        reserved = {name: consent.epsilon for name, consent in who.consents.items()}
        summary = conclude(run, progress, reserved) | {
            "institutions": sorted(reserved),
            "ended": str(ended or ""),
        }
        write_summary(folder, summary)
    if ended is not None:
        raise ended
    return summary


def _manifest(config: Config, public: PublicSide, coordinator: Coordinator) -> RunManifest:
    model = public.model
    projection = "" if model.projection is None else model.projection.digest
    return make_manifest(
        replace(config, lora=model.lora),  # names for "auto": nodes build what they read
        model.task.labels,
        model.base_digest,
        model.spec.digest,
        projection,
        default_cache(),
        coordinator.federation,
        config.aggregation.minimum_cohort,
        moved=model.spec.moved,
    )
