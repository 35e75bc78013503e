"""The same federation on Flower's Ray simulation: `flwr run .`, or `fedlora-sim run --engine ray`.

The round loop of the sequential engine runs inside Flower's ServerApp and asks a `GridCohort`; its
trainers run inside Flower's ClientApp. A simulated node answers for every client whose number,
modulo the count of nodes, is the node's partition id: any number of nodes serves any number of
clients.

Nodes and coordinator share the run's folder: configuration, manifest, ledger and the trainers'
state between rounds lie there, so it does not matter which actor trains a client. An actor builds
its federation once.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# nothing is to be packaged: actors run what is installed
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors may share a GPU

import importlib.util
import json
import logging
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedlora.client.training.moments import MomentStore
from fedlora.client.training.trainer import Trainer
from fedlora.common.config.schema import load_config
from fedlora.common.disk.files import write_atomically
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.state import AdapterState, Vector
from fedlora.common.protocol import flower
from fedlora.common.protocol.messages import vector_from_bytes
from fedlora.common.protocol.stages import Request
from fedlora.common.terminal import one_line
from fedlora.server.deployment.flower import (
    DECLINED,
    MAX_STAGE_BYTES,
    REFUSED,
    SECURE,
    Clock,
    GridCohort,
    GridExchange,
    enrol,
)
from fedlora.server.rounds.checkpoint import Progress
from fedlora.server.rounds.cohort import Cohort, replies_needed
from fedlora.server.runs.metrics import Observe
from fedlora.server.runs.run import conduct, to_its_end
from fedlora.server.secagg.log import liars_in, note_in
from fedlora.server.secagg.seen_keys import SeenKeys
from fedlora.server.secagg.sums import SecureCohort
from fedlora.simulations.begin import Options, begin, federation_of, machine_of, with_corpus
from fedlora.simulations.engines.sequential import choose_clients
from fedlora.simulations.federation.packaged import packaged_config
from fedlora.simulations.federation.population import Federation, client_name
from fedlora.simulations.federation.run_folder import Paths, SimulatedRun, finish
from fedlora.simulations.report.pages import write_report

QUICKSTART = "quickstart"
MAX_NODES = 100  # Flower looks at its nodes one by one; more nodes than actors gain nothing
# in the run's folder: what a node needs beside configuration and manifest
NODES_FILE = "nodes.json"
START_SECONDS = 1800.0  # for the actors to start, load the model and encode the data
STOP_SECONDS = 120.0  # for the round loop to notice that Flower has gone

# Opacus gives the root logger a handler; Flower has its own, and would speak twice, at DEBUG.
logging.getLogger("flwr").propagate = False

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """`flwr run`: a whole run, from configuration to report."""
    folder, settings = _folder(context), context.run_config
    name, ledger = str(settings["config"]), str(settings["ledger"])
    print(f"run     {folder}", flush=True)
    config = load_config(packaged_config(Path(name)), shlex.split(str(settings["set"])))
    if name == QUICKSTART:
        config = with_corpus(config, folder / "data")
    options = Options(
        engine="ray",
        device="cpu",
        resume=settings["resume"] is True,
        ledger=Path(ledger) if ledger else None,
    )
    run = begin(config, folder, options)

    def finished(progress: Progress, ended: str) -> dict[str, Any]:
        summary = finish(run, progress, ended, synthetic=name == QUICKSTART)
        print(f"report  {write_report(folder)}", flush=True)
        print(f"adapter {summary['adapter_digest']}", flush=True)
        return summary

    def train() -> Progress:
        return conduct(run, _cohort(grid, run, Clock()), _print_round)

    to_its_end(run.checkpoint, train, finished)


@client_app.query()
def offered(message: Message, context: Context) -> Message:
    """`flwr run`: the coordinator offers a run."""
    return _answer_offer(message, context, _folder(context))


@client_app.train()
def asked(message: Message, context: Context) -> Message:
    """`flwr run`: the coordinator asks one client for its part of a round."""
    return _answer_plan(message, _folder(context))


def train_on_ray(run: SimulatedRun, observe: Observe) -> Progress:
    """The round loop of a run on Ray actors, one for each CPU; raises what the loop raises.

    Flower runs the loop in a thread beside its simulation; when either ends, so does the other.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadInput(
            "--engine ray: found no Ray, expected an installation with the extra: fedlora[sim]"
        )
    stop = threading.Event()
    outcome: Future[Progress] = Future()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with _interrupts(stop):
        try:
            run_simulation(
                _server(run, observe, stop, outcome),
                _client(run.folder),
                num_supernodes=min(run.clients, MAX_NODES),
                backend_config={"client_resources": {"num_cpus": 1}, "init_args": {}},
            )
        except RuntimeError as error:  # Flower has logged the cause
            raise FedloraError(f"Flower's simulation stopped: {error}") from error
        finally:
            stop.set()
            wait([outcome], timeout=STOP_SECONDS)
    return outcome.result(timeout=0)


def _server(
    run: SimulatedRun, observe: Observe, stop: threading.Event, outcome: Future[Progress]
) -> ServerApp:
    app = ServerApp()

    @app.main()
    def serve_begun(grid: Grid, context: Context) -> None:
        try:
            outcome.set_result(conduct(run, _cohort(grid, run, _stoppable(stop)), observe))
        except BaseException as error:  # of any kind: the caller's thread raises it
            outcome.set_exception(error)

    return app


def _client(folder: Path) -> ClientApp:
    app = ClientApp()

    @app.query()
    def offered_here(message: Message, context: Context) -> Message:
        return _answer_offer(message, context, folder)

    @app.train()
    def asked_here(message: Message, context: Context) -> Message:
        return _answer_plan(message, folder)

    return app


@contextmanager
def _interrupts(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C stops the round loop before the actors, whose end would look like a failed attempt."""

    def interrupt(number: int, frame: object) -> None:
        stop.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stoppable(stop: threading.Event) -> Clock:
    """A clock that raises KeyboardInterrupt once `stop` is set."""

    def now() -> float:
        if stop.is_set():
            raise KeyboardInterrupt
        return time.monotonic()

    def sleep(seconds: float) -> None:
        stop.wait(seconds)
        now()

    return Clock(now, sleep)


def _cohort(grid: Grid, run: SimulatedRun, clock: Clock) -> Cohort:
    """Tell the nodes how to build what the coordinator built, and wait until they have."""
    shared = _Shared(str(run.paths.ledger), str(run.federation.model.device))
    write_atomically(run.folder / NODES_FILE, shared.to_bytes())
    clients = run.clients
    enrolled = enrol(grid, run.manifest, clients, START_SECONDS, clock=clock)

    def choose(plan: RoundPlan) -> list[str]:
        return [
            client_name(client) for client in choose_clients(run.manifest, run.federation, plan)
        ]

    deadline = run.deadline
    if run.manifest.secure is None:
        return GridCohort(grid, enrolled.nodes, choose, deadline, clock)
    from fedlora.simulations.engines.keeper import Keeper  # Flower has started Ray by now

    keeper = Keeper.start(list(enrolled.nodes), run.manifest)
    exchange = GridExchange(grid, enrolled.nodes, deadline, clock)
    quorum, minimum = run.rules.quorum, run.rules.minimum

    def needed(asked: int) -> int:
        return replies_needed(asked, quorum, minimum)

    folder = run.folder
    kept = (note_in(folder), liars_in(folder), SeenKeys(folder))
    return SecureCohort(run.manifest, keeper.identities, exchange, choose, needed, *kept)


@dataclass(frozen=True)
class _Shared:
    """Where every actor computes, and what it charges; how it computes lies beside it."""

    ledger: str
    device: str

    def to_bytes(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def read(cls, folder: Path) -> _Shared:
        return cls(**json.loads((folder / NODES_FILE).read_bytes()))


@dataclass(eq=False)
class _Resident:
    """What an actor keeps between messages."""

    federation: Federation
    manifest: RunManifest
    ledger: Ledger
    moments: MomentStore
    numbers: Mapping[str, int]  # of clients, by name

    def trainer(self, client: str) -> Trainer:
        if client not in self.numbers:
            raise BadInput(f"plan client: found {client}, which is not in this federation")
        secure = self.manifest.secure is not None
        number = self.numbers[client]
        return self.federation.trainer(
            number, self.manifest, self.ledger, self.moments, masked=secure
        )


def _resident(folder: Path) -> _Resident:
    manifest = RunManifest.from_json((folder / "manifest.json").read_bytes())
    return _build(folder, manifest.digest)


@lru_cache(maxsize=1)
def _build(folder: Path, digest: str) -> _Resident:
    """Once for each actor and run; `digest` tells runs apart that had the same folder."""
    shared = _Shared.read(folder)
    config = load_config(folder / "config.toml")
    federation = federation_of(config, folder, machine_of(config, Options(device=shared.device)))
    return _Resident(
        federation=federation,
        manifest=RunManifest.from_json((folder / "manifest.json").read_bytes()),
        ledger=Paths.of(folder, Path(shared.ledger)).open_ledger(),
        moments=MomentStore(folder / "clients"),
        numbers={client_name(client): client for client in federation.clients},
    )


def _answer_offer(message: Message, context: Context, folder: Path) -> Message:
    """Name this node's clients; each consents when first asked, as in the sequential engine."""
    place, nodes = (
        int(context.node_config["partition-id"]),
        int(context.node_config["num-partitions"]),
    )
    try:
        resident, offered = _resident(folder), flower.read_offer(message.content)
        if offered.digest != resident.manifest.digest:
            raise Refused(f"manifest: found {offered.digest}, expected {resident.manifest.digest}")
        clients = resident.federation.clients[place::nodes]
        record = flower.consent_record([client_name(client) for client in clients])
    except FedloraError as error:
        record = flower.refusal_record(f"node-{place}", error)
    return Message(record, reply_to=message)


def _answer_plan(message: Message, folder: Path) -> Message:
    """Train the client that the plan names; a plan that can't be read is Flower's to report."""
    resident = _resident(folder)
    if resident.manifest.secure is not None:
        return Message(_staged(resident, message.content), reply_to=message)
    task = flower.read_plan(message.content, resident.federation.model.spec)
    return Message(_trained(resident, task), reply_to=message)


def _trained(resident: _Resident, task: flower.Task) -> RecordDict:
    try:
        return flower.update_record(resident.trainer(task.client).train(task.plan, task.state))
    except FedloraError as error:
        return flower.refusal_record(task.client, error)


def _staged(resident: _Resident, record: RecordDict) -> RecordDict:
    """A stage of secure aggregation: the secrets are with the keeper, the training is here."""
    from fedlora.simulations.engines.keeper import Keeper

    spec = resident.federation.model.spec
    data = flower.read_envelope(record, MAX_STAGE_BYTES + 4 * spec.size)[1]
    request = Request.from_bytes(data)

    def train() -> Vector:
        state = AdapterState(spec, vector_from_bytes(request.vector, spec.size, "stage"))
        return resident.trainer(request.institution).train(request.plan, state).delta

    try:
        return flower.envelope_record(
            SECURE, Keeper.find(resident.manifest).answer(data, spec, train)
        )
    except FedloraError as error:
        kind = REFUSED if isinstance(error, Refused) else DECLINED
        return flower.envelope_record(kind, one_line(str(error)).encode())


def _folder(context: Context) -> Path:
    """`out` of Flower's run configuration, where {run} stands for Flower's number of the run."""
    return Path(str(context.run_config["out"]).replace("{run}", str(context.run_id))).resolve()


def _print_round(number: int, figures: Mapping[str, float | None]) -> None:
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
    print(f"round {number:4d}  {shown}", flush=True)
