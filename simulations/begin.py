"""From a configuration to a run that has begun: here, and in `experiments`, it is seen whole.

    1. read the records, choose what the configuration leaves open, build the network, deal out
    2. make the manifest, or read the one of the run that is resumed
    3. from the checkpoint on it is a run; then its ε is reserved for the whole population

What comes after is given the parts that it needs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedlora.client.training.timing import Steps
from fedlora.common.config.load import parse_config
from fedlora.common.config.parts import NetworkRecipe, Terms
from fedlora.common.config.schema import Config, FaultsConfig, config_to_toml
from fedlora.common.data.records import Records, UnitIndex, unit_groups
from fedlora.common.disk.files import read_text, write_text
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.machine import device_named
from fedlora.common.privacy.calibration import default_cache
from fedlora.common.privacy.modes import guarantee_asked
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.runs.public_data import Machine, PublicSide
from fedlora.server.runs.run import rules_of, strategies_of
from fedlora.server.runs.schedule import make_manifest
from fedlora.server.runs.warm_start import forget_beginning, started, taught, turned
from fedlora.server.strategies.gathered import gathering
from fedlora.simulations.chosen import (
    CONFIG,
    decided_run,
    differing,
    taken_as_public,
    write_decided,
)
from fedlora.simulations.federation.partition import Partition, partition_by, partition_units
from fedlora.simulations.federation.population import Federation
from fedlora.simulations.federation.public_part import Choose, choice_for, kept_choice, shares
from fedlora.simulations.federation.record_loss import with_loss
from fedlora.simulations.federation.run_folder import Paths, SimulatedRun
from fedlora.simulations.federation.sources import Sources, read_sources
from fedlora.simulations.options import DEFAULTS, NOTHING_OWN, Options, Own

# in a run's folder: which data, which ledger and which parts of one's own it began with
DATA, LEDGER, OWN = "data.sha256", "ledger.id", "own.json"
ENGINES = ("sequential", "ray")
# told how many records went through the frozen model, and of how many
Features = Callable[[int, int], None]


def begin(
    config: Config,
    folder: Path,
    options: Options = DEFAULTS,
    own: Own = NOTHING_OWN,
    on_features: Features = lambda done, records: None,
) -> SimulatedRun:
    """Build everything; BadInput lists what is wrong with the configuration.

    BadInput too where the folder holds another run, or, with `resume`, none; Refused without the
    run's own ledger.
    """
    began, config = time.monotonic(), checked(config)
    paths = Paths.of(folder, options.ledger)
    _check_options(config, options, own)
    _ready_folder(config, paths, options.resume)
    federation, config, chosen, shared = _prepared(config, paths, options, own, on_features)
    federation.check_memory(head=config.training.head_rounds > 0 and not options.resume)
    checkpoint, ledger = (_resumed if options.resume else _new)(config, paths, federation, own)
    said = taught(paths.folder, config.training.public_epochs)
    manifest = checkpoint.manifest
    checkpoint.check_against_ledger(ledger.attempts_used(manifest.digest))
    # After the checkpoint: a kill in between must not spend a budget for a run that never was.
    federation.charge(manifest, ledger)
    return SimulatedRun(
        folder=paths.folder,
        public=federation.public,
        checkpoint=checkpoint,
        strategies=own.strategies(manifest) or strategies_of(config.server, manifest),
        rules=rules_of(config.federation, config.server, config.aggregation, manifest),
        clients=config.federation.clients,
        engine=options.engine,
        config=config_to_toml(config),
        gather=gathering(config.aggregation),
        caveats=(*taken_as_public(config, chosen), *shared, *said, *own.caveats),
        began=began,
        federation=federation,
        ledger=ledger,
        paths=paths,
        deadline=config.federation.deadline,
        faults=config.faults,
        own=own.names,
        chosen=chosen,
    )


def _prepared(
    config: Config, paths: Paths, options: Options, own: Own, on_features: Features
) -> tuple[Federation, Config, tuple[str, ...], tuple[str, ...]]:
    """The federation, the configuration with a value in every place, what was chosen in it, and
    what a statement must say of its data.
    """
    done: list[int] = []

    def features(more: int) -> None:
        done.append(more)
        # a start on public records looks at some of them by itself
        on_features(sum(done), max(sum(done), federation.feature_records))

    machine = machine_of(config, options, features)
    folder, data = paths.folder, config.data
    choose = kept_choice(folder, config.seed) if options.resume else choice_for(data, folder)
    sources = sources_of(config, choose, own)
    config, chosen = decided_run(config, sources, paths.folder, options.resume)
    federation = federation_of(config, sources, folder, machine, own, begins=not options.resume)
    if not options.resume:
        write_decided(config, chosen, paths.folder)
    return federation, config, chosen, sources.caveats


def checked(config: Config) -> Config:
    """The same, whoever made it; BadInput lists what no file could say."""
    if not isinstance(config, Config):
        raise BadInput(f"config: found {config!r:.100}, expected what load_config gives")
    return parse_config(config_to_toml(config))


def sources_of(config: Config, choose: Choose, own: Own = NOTHING_OWN) -> Sources:
    """The records that a configuration names, as read; BadInput names what is wrong.

    So where δ is not below one over the number of whoever is protected.
    """
    dealing = config.federation
    wanted = dealing.partition == "by-column" or own.partition is not None
    named = (dealing.column if wanted else "", config.evaluation.group)
    more = tuple(dict.fromkeys(each for each in named if each))
    read = read_sources(config.data, config.model.task, choose, more)
    units, privacy = len(unit_groups(read.train.units, len(read.train))), config.privacy
    guarantee = guarantee_asked(privacy)
    guarantee.check_delta(privacy.delta, units, read.train.where, dealing.clients)
    if own.loss is None:
        return read
    task = with_loss(read.public.task, own.loss)
    return replace(read, public=replace(read.public, task=task))


def federation_of(
    config: Config,
    sources: Sources,
    folder: Path,
    machine: Machine,
    own: Own = NOTHING_OWN,
    *,
    begins: bool = False,
) -> Federation:
    """Deal the units out, encode the data, load the model; `config` has a value in every place.

    BadInput names what is wrong. What is computed once for a run and must not change in it lies in
    the run's `folder`. In one that `begins`, LoRA learns from public records where it has to before
    a projection is fitted: that takes minutes, and comes after the dealing, which may be refused.
    """
    units = unit_groups(sources.train.units, len(sources.train))
    partition = dealt(config, sources.train, units, own)
    recipe, public = NetworkRecipe.of(config), sources.public
    learnt = turned(recipe, public, folder, machine) if begins else None
    side = PublicSide.build(recipe, public, folder, machine, learnt)
    tokens, asked = config.training.micro_batch_tokens, config.evaluation
    steps = Steps.of(config.training, config.federation.rounds, config.privacy, config.data.unit)
    return Federation.build(side, sources, partition, config.privacy, steps, tokens, folder, asked)


def dealt(config: Config, records: Records, units: UnitIndex, own: Own = NOTHING_OWN) -> Partition:
    """Which institution has which unit; BadInput where the units can't be dealt out so."""
    if own.partition is not None:
        return partition_by(own.partition, config.federation.clients, records, units)
    return partition_units(config.federation, records, units, config.seed)


def manifest_of(config: Config, federation: Federation) -> RunManifest:
    """A new run of a federation.

    Nobody here is hostile to a record: batches are packed unless the configuration says otherwise.
    """
    terms = Terms.of(config, batches="packed")
    return make_manifest(terms, federation.public.facts, default_cache())


def machine_of(
    config: Config, options: Options, features: Callable[[int], None] | None = None
) -> Machine:
    """What computes a run here; BadInput where there is no such device."""
    return Machine(
        device=device_named(options.device),
        attention=config.training.attention,
        precision=config.training.precision,
        checkpointing=config.training.checkpointing,
        texts=options.texts,
        progress=features,
    )


def _new(
    config: Config, paths: Paths, federation: Federation, own: Own
) -> tuple[Checkpoint, Ledger]:
    state, score = started(federation.public, paths.folder)
    manifest, ledger = manifest_of(config, federation), paths.open_ledger()
    manifest = replace(manifest, strategy=own.names.get("strategy", manifest.strategy))
    write_text(paths.folder / DATA, federation.origin.digest + "\n")
    write_text(paths.folder / LEDGER, ledger.id + "\n")
    write_text(paths.folder / "manifest.json", manifest.to_bytes().decode() + "\n")
    if own.names:  # a run of the configuration alone has no such file
        write_text(paths.folder / OWN, _kept(own, federation))
    # last: from here on it is a run, and can be resumed
    return Checkpoint.create(paths.checkpoint, manifest, state, score), ledger


def _resumed(
    config: Config, paths: Paths, federation: Federation, own: Own
) -> tuple[Checkpoint, Ledger]:
    if read_text(paths.folder / DATA).strip() != federation.origin.digest:
        raise BadInput(
            f"{config.data.train}: found other bytes than the run began with, expected the same"
            " file"
        )
    kept = paths.folder / OWN
    before = read_text(kept) if kept.exists() else _kept(NOTHING_OWN, federation)
    if before != _kept(own, federation):
        raise BadInput(
            f"{kept}: found another strategy, partition, cohort or loss of one's own than the run"
            " began with, expected the same"
        )
    checkpoint = Checkpoint.open(paths.checkpoint, federation.model.spec)
    federation.public.check_of(checkpoint.manifest)
    return checkpoint, _same_ledger(paths)


def _kept(own: Own, federation: Federation) -> str:
    """What who resumes must give again: dealt out anew, a unit would be two clients'."""
    dealt = {"dealt": federation.partition.digest} if own.partition is not None else {}
    return json.dumps({**own.names, **dealt}, sort_keys=True) + "\n"


def _same_ledger(paths: Paths) -> Ledger:
    """The ledger that the run began with; Refused where it is another one, or gone."""
    if not paths.ledger.exists():
        raise Refused(f"{paths.ledger}: found no ledger, expected the one that the run began with")
    ledger = paths.open_ledger()
    if read_text(paths.folder / LEDGER).strip() != ledger.id:
        raise Refused(f"{paths.ledger}: found another ledger than the run began with")
    return ledger


def _check_options(config: Config, options: Options, own: Own) -> None:
    if options.ledger is not None and not options.resume and shares(config.data):
        part, share = next(iter(shares(config.data).items()))
        raise BadInput(
            f"--ledger: found [data] {part} = {share:g}, a share of the training file, expected a"
            " public file: what is made public is in nobody's budget"
        )
    if options.engine not in ENGINES:
        raise BadInput(f"--engine {options.engine}: expected one of {', '.join(ENGINES)}")
    if options.engine == "ray" and config.faults != FaultsConfig():
        raise BadInput(
            "--engine ray: [faults] are made up by the sequential engine only, expected none"
        )
    if options.engine == "ray" and (own.partition or own.cohort or own.loss) is not None:
        raise BadInput(
            "--engine ray: its actors know the configuration alone, expected the sequential engine"
            " for a partition, a cohort or a loss of one's own"
        )


def _ready_folder(config: Config, paths: Paths, resume: bool) -> None:
    """BadInput unless the folder holds no run or, to be resumed, one of this configuration."""
    begun = (paths.checkpoint / "manifest.json").exists()
    if begun and not resume:
        raise BadInput(
            f"{paths.folder}: found a run, expected an empty folder; --resume goes on with it"
        )
    if not resume:
        # Of a killed beginning: fitted on what was public then, and may be private in this run.
        forget_beginning(paths.folder)
        return
    if not begun:
        raise BadInput(f"{paths.folder}: found no run to resume")
    before = parse_config(read_text(paths.folder / CONFIG))
    if other := differing(config, before):
        raise BadInput(
            f"{paths.folder / CONFIG}: found another configuration than the one given to --resume:"
            f" {'; '.join(other[:3])}"
        )
