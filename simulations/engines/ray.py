"""The same federation on Flower's Ray simulation: `flwr run .`, or `fedlora-sim run --engine ray`.

The round loop of the sequential engine runs inside Flower's ServerApp, over the deployment's cohort
and carrier; trainers run inside Flower's ClientApp. Any simulated node answers for any institution,
and a message's group says for which: any number of nodes serves any number of clients.
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
import logging
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedlora.common.config.load import load_config
from fedlora.common.errors import BadInput, FedloraError
from fedlora.common.protocol.flower import envelope_record, read_envelope
from fedlora.common.protocol.messages import MAX_REQUEST_BYTES
from fedlora.common.trust.identity import Identity
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.cohorts import cohort_of
from fedlora.server.deployment.flower import REQUEST, Clock, GridCarrier
from fedlora.server.deployment.talks import LONGEST_POLL
from fedlora.server.rounds.checkpoint import Progress
from fedlora.server.rounds.cohort import Cohort, Failure
from fedlora.server.runs.metrics import Observe
from fedlora.server.runs.run import conduct, to_its_end
from fedlora.simulations.begin import begin
from fedlora.simulations.engines.gpu_shares import asked_of_cluster, on_gpus
from fedlora.simulations.engines.nodes import Simulated, resident_of
from fedlora.simulations.engines.shared import Shared
from fedlora.simulations.federation.packaged import packaged_config, with_corpus
from fedlora.simulations.federation.population import client_name
from fedlora.simulations.federation.run_folder import SimulatedRun, finish
from fedlora.simulations.options import Options
from fedlora.simulations.report.pages import write_report

QUICKSTART = "quickstart"
MAX_NODES = 100  # Flower looks at its nodes one by one; more nodes than actors gain nothing
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
        data = with_corpus(config.data, config.seed, folder / "data")
        config = replace(config, data=data)
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


@client_app.train()
def asked(message: Message, context: Context) -> Message:
    """`flwr run`: the coordinator asks one client for its part of a round."""
    return _answered(message, _folder(context))


def workers(options: Options, clients: int) -> dict[str, float]:
    """What each actor asks of the cluster, which is connected to where it computes on GPUs.

    BadInput where there is no Ray, or no machine in the cluster has what is asked for.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadInput(
            "--engine ray: found no Ray, expected an installation with the extra: fedlora[sim]"
        )
    if not on_gpus(options):
        return {"num_cpus": 1}
    import ray

    if not ray.is_initialized():  # else Flower would, with the same words
        path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH", "")]))
        ray.init(include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    return asked_of_cluster(options.gpu_share, clients, machines)


def train_on_ray(run: SimulatedRun, observe: Observe, options: Options) -> Progress:
    """The round loop of a run on Ray actors, one for each CPU, or fewer where they share GPUs;
    raises what the loop raises.

    Flower runs the loop in a thread beside its simulation; when either ends, so does the other.
    """
    nodes = min(run.clients, MAX_NODES)
    resources = workers(options, nodes)
    stop = threading.Event()
    outcome: Future[Progress] = Future()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with _interrupts(stop):
        try:
            run_simulation(
                _server(run, observe, stop, outcome),
                _client(run.folder),
                num_supernodes=nodes,
                backend_config={"client_resources": {**resources}, "init_args": {}},
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

    @app.train()
    def asked_here(message: Message, context: Context) -> Message:
        return _answered(message, folder)

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
    identity, names = Identity.generate(), [client_name(each) for each in run.federation.clients]
    shared = Shared.of(run, identity.public)
    shared.write(run.folder)
    members = {name: shared.identity(name).public for name in names}
    _wake(grid, clock)

    def nodes() -> dict[str, int]:
        return dict(zip(names, cycle(sorted(grid.get_node_ids()))))  # any can answer for anybody

    coordinator = Coordinator(run.manifest.federation, identity, lambda: members)
    who = Simulated(run, GridCarrier(grid, nodes, clock), coordinator)
    if run.manifest.secure is not None:
        from fedlora.simulations.engines.keeper import Keeper  # Flower has started Ray by now

        who.keeper = Keeper.start(run, shared)
    return cohort_of(who, run.gather)


def _wake(grid: Grid, clock: Clock) -> None:
    """An empty request to each node; FedloraError where none has built its federation in time."""
    end = clock.now() + START_SECONDS
    while not list(grid.get_node_ids()) and clock.now() < end:
        clock.sleep(LONGEST_POLL)
    nodes = {f"node {node}": node for node in grid.get_node_ids()}
    answers = GridCarrier(grid, lambda: nodes, clock).ask(dict.fromkeys(nodes, b""), START_SECONDS)
    failures = [answer for _, answer in answers if isinstance(answer, Failure)]
    if len(failures) == len(nodes):
        reasons = [f"{failure.client}: {failure.reason}" for failure in failures]
        raise FedloraError("\n".join(reasons) or f"no node came online in {START_SECONDS:g} s")


def _answered(message: Message, folder: Path) -> Message:
    """The reply to a request; a message that can't be read is Flower's to report."""
    resident = resident_of(folder)
    _, data = read_envelope(message.content, MAX_REQUEST_BYTES)
    answer = resident.answer(message.metadata.group_id, data) if data else b""
    return Message(envelope_record(REQUEST, answer), reply_to=message)


def _folder(context: Context) -> Path:
    """`out` of Flower's run configuration, where {run} stands for Flower's number of the run."""
    return Path(str(context.run_config["out"]).replace("{run}", str(context.run_id))).resolve()


def _print_round(number: int, figures: Mapping[str, float | None]) -> None:
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
    print(f"round {number:4d}  {shown}", flush=True)
