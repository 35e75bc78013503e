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

from pathlib import Path
from typing import Any

from fedlora.common.config.load import load_config
from fedlora.common.config.parts import NetworkRecipe, Terms
from fedlora.common.config.schema import Config, config_to_toml
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput
from fedlora.common.privacy.calibration import default_cache
from fedlora.common.protocol.messages import MANIFEST_TAG
from fedlora.common.protocol.vector_parts import check_travels
from fedlora.common.trust.identity import Signed
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.defaults.decide import decided
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.server.deployment.cohorts import cohort_of
from fedlora.server.deployment.institutions import Carrier
from fedlora.server.deployment.participants import Participants
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.loop import Around
from fedlora.server.runs.metrics import nobody
from fedlora.server.runs.public_data import Machine, PublicSide, read_public
from fedlora.server.runs.run import Run, conclude, conduct, rules_of, strategies_of, to_its_end
from fedlora.server.runs.schedule import make_manifest
from fedlora.server.runs.tracking import check_trackers, tracked
from fedlora.server.runs.warm_start import forget_beginning, started, taught, turned
from fedlora.server.strategies.gathered import gathering


def serve(folder: Path, coordinator: Coordinator, carrier: Carrier) -> dict[str, Any]:
    """Begin the run in `folder`, or go on with it, to its summary; raises what the loop raises.

    A run that ends early leaves its last adapter and its summary all the same: an export tells what
    became of it.
    """
    config = load_config(folder / "config.toml")
    _check_folder(folder, config)
    check_trackers(config.tracking)
    run = _begun(folder, config, coordinator)
    signed = Signed.by(coordinator.identity, MANIFEST_TAG, run.manifest.to_bytes())
    write_atomically(folder / "manifest.signed", signed.to_bytes())
    asked, deadline = run.clients, config.federation.deadline
    who = Participants(
        run.manifest, coordinator, carrier, folder, asked, deadline, run.rules.quorum
    )

    def finish(progress: Progress, ended: str) -> dict[str, Any]:
        reserved = {name: each.epsilon for name, each in who.reserved.items()}
        more = {"institutions": sorted(reserved), "ended": ended}
        return conclude(run, progress, reserved, lambda: more)

    def trained() -> Progress:
        with tracked(config.tracking, folder, nobody) as told:
            return conduct(
                run, cohort_of(who, run.gather), told, Around(who.ready, unfinished=who.unfinished)
            )

    return to_its_end(run.checkpoint, trained, finish)


def _check_folder(folder: Path, config: Config) -> None:
    """BadInput where no run could begin here, or one was begun whose manifest is gone."""
    if config.federation.clients < config.aggregation.minimum_cohort:
        raise BadInput(
            f"[federation] clients = {config.federation.clients}: expected at least the "
            f"[aggregation] minimum_cohort = {config.aggregation.minimum_cohort}"
        )
    manifest = folder / "checkpoint" / "manifest.json"
    # offered to institutions: a new one would be charged anew
    if not manifest.exists() and (folder / "manifest.signed").exists():
        raise BadInput(f"{manifest}: missing, expected that of the run that was begun")


def _begun(folder: Path, config: Config, coordinator: Coordinator) -> Run:
    """The run that lies in `folder`, or a new one: here its configuration is spent."""
    path, begun = folder / "checkpoint", (folder / "checkpoint" / "manifest.json").exists()
    if not begun:
        forget_beginning(folder)
    records = read_public(config.data, config.model.task)
    if not begun:
        config = decided(config, PublicFacts(0, records.task.outputs, records.learnable))
        write_atomically(folder / "config.toml", config_to_toml(config).encode())
    training = config.training
    machine = Machine(
        attention=training.attention,
        precision=training.precision,
        checkpointing=training.checkpointing,
    )
    recipe = NetworkRecipe.of(config)
    learnt = None if begun else turned(recipe, records, folder, machine)
    public = PublicSide.build(recipe, records, folder, machine, learnt)
    if begun:
        checkpoint = Checkpoint.open(path, public.model.spec)
        public.check_of(checkpoint.manifest)
    else:
        checkpoint = _new(path, config, public, coordinator.federation)
    return Run(
        folder=folder,
        public=public,
        checkpoint=checkpoint,
        strategies=strategies_of(config.server, checkpoint.manifest),
        rules=rules_of(config.federation, config.server, config.aggregation, checkpoint.manifest),
        clients=config.federation.clients,
        engine="flower",
        gather=gathering(config.aggregation),
        config=config_to_toml(config),
        caveats=taught(folder, training.public_epochs),
    )


def _new(path: Path, config: Config, public: PublicSide, federation: str) -> Checkpoint:
    """What would fail later is asked first: nobody is charged for it."""
    check_travels(public.model.spec.size)
    if config.training.head_rounds:
        scores = public.validation
        public.features.check_room(scores.data, [len(scores.data.scored(scores.rows).records)])
    cache, cohort = default_cache(), config.aggregation.minimum_cohort
    manifest = make_manifest(Terms.of(config), public.facts, cache, federation, cohort)
    return Checkpoint.create(path, manifest, *started(public, path.parent))
