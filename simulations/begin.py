"""From a configuration to a run that has begun: here, and in `experiments`, it is seen whole.

    1. read the records, build the network on them, deal the units out
    2. make the manifest, or read the one of the run that is resumed
    3. from the checkpoint on it is a run; then its ε is reserved for the whole population

What comes after is given the parts that it needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedlora.common.config.parts import NetworkRecipe, Terms
from fedlora.common.config.schema import Config, FaultsConfig, config_to_toml
from fedlora.common.data.records import Records, UnitIndex, unit_groups
from fedlora.common.disk.files import write_text
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.features import PooledTexts
from fedlora.common.privacy.calibration import default_cache
from fedlora.common.privacy.modes import guarantee_named
from fedlora.server.rounds.checkpoint import Checkpoint
from fedlora.server.runs.public_data import Machine, PublicSide, forget_beginning
from fedlora.server.runs.run import rules_of, strategies_of
from fedlora.server.runs.schedule import make_manifest
from fedlora.simulations.federation.corpus import generate, write
from fedlora.simulations.federation.partition import Partition, partition_units
from fedlora.simulations.federation.population import Federation
from fedlora.simulations.federation.run_folder import Paths, SimulatedRun
from fedlora.simulations.federation.sources import read_sources

# in a run's folder: which data and which ledger it began with
DATA, LEDGER = "data.sha256", "ledger.id"
ENGINES = ("sequential", "ray")
Features = Callable[[int], None]  # told how many more records went through the frozen model


@dataclass(frozen=True, eq=False)
class Options:
    """How a run is carried out: nothing here changes what it learns or what it guarantees."""

    engine: str = "sequential"  # or "ray"
    device: str = "auto"  # cpu, cuda, or auto: a GPU where there is one
    threads: int = 0  # CPU threads; 0 leaves the choice to torch
    resume: bool = False  # go on with the run in the folder
    ledger: Path | None = None  # shared between runs; None: the run's own
    texts: PooledTexts | None = None  # features that runs of this process have in common


def begin(
    config: Config, folder: Path, options: Options | None = None, features: Features | None = None
) -> SimulatedRun:
    """Build everything.

    BadInput where the folder holds another run, or, with `resume`, none; Refused without the run's
    own ledger.
    """
    began, options = time.monotonic(), options or Options()
    paths = Paths.of(folder, options.ledger)
    _check_options(config, options)
    _check_folder(config, paths, options.resume)
    if not options.resume:
        # Of a killed beginning: fitted on what was public then, and may be private in this run.
        forget_beginning(paths.folder)
    federation = federation_of(config, paths.folder, machine_of(config, options, features))
    checkpoint, ledger = (
        _resumed(config, paths, federation) if options.resume else _new(config, paths, federation)
    )
    manifest = checkpoint.manifest
    checkpoint.check_against_ledger(ledger.attempts_used(manifest.digest))
    # After the checkpoint: a kill in between must not spend a budget for a run that never was.
    federation.charge(manifest, ledger)
    return SimulatedRun(
        folder=paths.folder,
        public=federation.public,
        checkpoint=checkpoint,
        strategies=strategies_of(config.server, manifest),
        rules=rules_of(config.federation, config.server, manifest),
        clients=config.federation.clients,
        engine=options.engine,
        config=config_to_toml(config),
        began=began,
        federation=federation,
        ledger=ledger,
        paths=paths,
        deadline=config.federation.deadline,
        faults=config.faults,
    )


def federation_of(config: Config, folder: Path, machine: Machine) -> Federation:
    """Read and encode the data, load the model, deal the units out.

    BadInput names what is wrong. What is computed once for a run and must not change in it lies in
    the run's `folder`.
    """
    dealing, privacy = config.federation, config.privacy
    more = (dealing.column,) if dealing.partition == "by-column" else ()
    sources = read_sources(config.data, config.model.task, config.seed, more)
    _check_delta(config, sources.train)
    public = PublicSide.build(NetworkRecipe.of(config), sources.public, folder, machine)
    budget = Budget(f"population {privacy.population}", privacy.epsilon, privacy.delta)

    def deal(records: Records, units: UnitIndex) -> Partition:
        return partition_units(dealing, records, units, config.seed)

    return Federation.build(public, sources, deal, budget, config.training.micro_batch_tokens)


def manifest_of(config: Config, federation: Federation) -> RunManifest:
    """A new run of a federation."""
    return make_manifest(Terms.of(config), federation.public.facts, default_cache())


def machine_of(config: Config, options: Options, features: Features | None = None) -> Machine:
    """What computes a run here; BadInput where there is no such device."""
    return Machine(
        device=torch_device(options.device),
        attention=config.training.attention,
        precision=config.training.precision,
        texts=options.texts,
        progress=features,
    )


def with_corpus(config: Config, folder: Path) -> Config:
    """The same run on the quickstart's corpus, which is made up in `folder`."""
    train, test = write(generate(config.seed), folder)
    return replace(config, data=replace(config.data, train=str(train), test=str(test)))


def torch_device(name: str) -> torch.device:
    """cpu, cuda, or auto: a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: expected cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: found no GPU")
    return torch.device(name)


def _new(config: Config, paths: Paths, federation: Federation) -> tuple[Checkpoint, Ledger]:
    manifest, ledger = manifest_of(config, federation), paths.open_ledger()
    write_text(paths.folder / "config.toml", config_to_toml(config))
    write_text(paths.folder / DATA, federation.data_digest + "\n")
    write_text(paths.folder / LEDGER, ledger.id + "\n")
    write_text(paths.folder / "manifest.json", manifest.to_bytes().decode() + "\n")
    # last: from here on it is a run, and can be resumed
    return Checkpoint.create(paths.checkpoint, manifest, federation.public.initial), ledger


def _resumed(config: Config, paths: Paths, federation: Federation) -> tuple[Checkpoint, Ledger]:
    if (paths.folder / DATA).read_text(encoding="utf-8").strip() != federation.data_digest:
        raise BadInput(
            f"{config.data.train}: found other bytes than the run began with, expected the same"
            " file"
        )
    return Checkpoint.open(paths.checkpoint, federation.model.spec), _same_ledger(paths)


def _same_ledger(paths: Paths) -> Ledger:
    """The ledger that the run began with; Refused where it is another one, or gone."""
    if not paths.ledger.exists():
        raise Refused(f"{paths.ledger}: found no ledger, expected the one that the run began with")
    ledger = paths.open_ledger()
    if (paths.folder / LEDGER).read_text(encoding="utf-8").strip() != ledger.id:
        raise Refused(f"{paths.ledger}: found another ledger than the run began with")
    return ledger


def _check_options(config: Config, options: Options) -> None:
    if options.engine == "batched":
        raise BadInput("--engine batched: not built yet; expected sequential or ray")
    if options.engine not in ENGINES:
        raise BadInput(f"--engine {options.engine}: expected one of {', '.join(ENGINES)}")
    if options.engine == "ray" and config.faults != FaultsConfig():
        raise BadInput(
            "--engine ray: [faults] are made up by the sequential engine only, expected none"
        )


def _check_folder(config: Config, paths: Paths, resume: bool) -> None:
    begun = (paths.checkpoint / "manifest.json").exists()
    if begun and not resume:
        raise BadInput(
            f"{paths.folder}: found a run, expected an empty folder; --resume goes on with it"
        )
    if not resume:
        return
    if not begun:
        raise BadInput(f"{paths.folder}: found no run to resume")
    before = (paths.folder / "config.toml").read_text(encoding="utf-8")
    if before != config_to_toml(config):
        raise BadInput(
            f"{paths.folder}/config.toml: found another configuration than the one given to"
            " --resume"
        )


def _check_delta(config: Config, train: Records) -> None:
    """BadInput unless δ is below one over the number of whoever is protected."""
    units, institutions = len(unit_groups(train.units, len(train))), config.federation.clients
    guarantee = guarantee_named(config.privacy.mode)
    guarantee.check_delta(config.privacy.delta, units, train.where, institutions)
