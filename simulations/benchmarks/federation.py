"""What a round between processes costs beyond its training.

In clear, under masks, and in an app as Flower's template has it. Three institutions, the same base
model and corpus, real processes on this machine. The app follows Flower's Hugging Face template: no
privacy, no TLS, and each message loads the model anew. Of our nodes, training lasts from the plan
that is kept to the update that is kept; the app measures its own. Evaluation on clients, which the
template has, is left out.

    python simulations/benchmarks/federation.py [--json FILE] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from fedlora.common.errors import FedloraError
from fedlora.common.model.base import resolve_base
from fedlora.simulations.federation.corpus import CLASSES, generate, write_records
from fedlora.simulations.local.deployment import Federation, running
from fedlora.simulations.local.folders import NAMES
from fedlora.simulations.local.processes import BIN, free_port, listens, signal_group, wait_until

SECONDS = 1800.0
PROJECT = """\
[project]
name = "template"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
rounds = 5
base = ""
labels = 2
out = ""
"""
SERVER = """\
import json, time
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from transformers import AutoModelForSequenceClassification

app = ServerApp()


@app.main()
def main(grid, context):
    settings = context.run_config
    model = AutoModelForSequenceClassification.from_pretrained(\
settings["base"], num_labels=settings["labels"])
    times = []
    result = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, \
min_train_nodes=3, min_available_nodes=3).start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=settings["rounds"],
        evaluate_fn=lambda number, arrays: times.append(time.time()),
    )
    training = [result.train_metrics_clientapp[number + 1]["seconds"] \
for number in range(settings["rounds"])]
    with open(settings["out"], "w") as stream:
        json.dump({"times": times, "training": training}, stream)
"""
CLIENT = """\
import json, time
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from transformers import AutoModelForSequenceClassification, AutoTokenizer

app = ClientApp()


@app.train()
def train(message, context):
    settings = context.run_config
    model = AutoModelForSequenceClassification.from_pretrained(\
settings["base"], num_labels=settings["labels"])
    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    with open(context.node_config["data"]) as stream:
        records = [json.loads(line) for line in stream][:80]
    began = time.time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for start in range(0, len(records), 16):
        batch = records[start : start + 16]
        inputs = tokenizer([each["text"] for each in batch], truncation=True, \
max_length=48, padding=True, return_tensors="pt")
        model(**inputs, labels=torch.tensor([each["label"] for each in batch])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    metrics = MetricRecord({"seconds": time.time() - began, "num-examples": len(records)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), \
"metrics": metrics}), reply_to=message)
"""


@dataclass(frozen=True)
class Cost:
    """Medians over the rounds after the first, in seconds."""

    system: str
    round_seconds: float
    training_seconds: float
    beyond_seconds: float
    first_round_seconds: float


def ours(root: Path, rounds: int, secure: bool) -> Cost:
    """A federation as `make federation` runs it."""
    federation = Federation(root, rounds=rounds, secure=secure)
    federation.prepare()
    with running(federation):
        if federation.wait(SECONDS):
            raise FedloraError(f"the federation did not end well; {root / 'logs'} says why")
    lines = (federation.last_run() / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    training = [
        max(_trained(federation.node(name))[place] for name in NAMES) for place in range(rounds)
    ]
    return _cost("ours, under masks" if secure else "ours, in clear", seconds, training)


def _trained(node: Path) -> list[float]:
    """Of each round, from the plan that the node kept to the update that it kept."""
    plans = sorted(node.glob("runs/*/plans/*.plan"))
    updates = {
        path.stem[-6:]: path
        for path in node.glob("outbox/*/*")
        if not path.stem.startswith("000000-")
    }
    return [updates[plan.stem].stat().st_mtime - plan.stat().st_mtime for plan in plans]


def template(root: Path, rounds: int) -> Cost:
    """The same texts in an app after Flower's template, on SuperLink and three SuperNodes."""
    out, port = root / "out.json", free_port()
    _write_app(root, port)
    settings = f'rounds={rounds} base="{resolve_base("minilm")}" labels={len(CLASSES)} out="{out}"'
    words = [str(BIN / "flwr"), "run", str(root / "app"), "--run-config", settings]
    with _flower(root, port):
        subprocess.run(words, env=_environment(root), check=True, capture_output=True)
        wait_until(out.exists, "the app's end", SECONDS)
        time.sleep(1.0)
    found = json.loads(out.read_text(encoding="utf-8"))
    seconds = [after - before for before, after in pairwise(found["times"])]
    return _cost("after Flower's template", seconds, found["training"])


def _write_app(root: Path, port: int) -> None:
    """The app, Flower's configuration that names its SuperLink, and each institution's records."""
    app, corpus = root / "app", generate(7)
    app.mkdir(parents=True)
    superlink = f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    texts = {
        app / "pyproject.toml": PROJECT,
        app / "server_app.py": SERVER,
        app / "client_app.py": CLIENT,
        root / "config.toml": f'[superlink]\ndefault = "here"\n[superlink.here]\n{superlink}',
    }
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    for name in NAMES:
        records = [
            {"text": each["text"], "label": list(CLASSES).index(each["label"])}
            for each in corpus.train
            if each["institution"] == name
        ]
        write_records(root / f"{name}.jsonl", records)


@contextmanager
def _flower(root: Path, port: int) -> Iterator[None]:
    """SuperLink and a SuperNode for each institution, until the end."""
    here = ["--insecure", "--host", "127.0.0.1", "--port"]
    commands = [["flower-superlink", *here, str(port)]]
    for name in NAMES:
        own = ["--superlink", f"127.0.0.1:{port}", "--node-config", f'data="{root / name}.jsonl"']
        commands.append(["flower-supernode", *here, str(free_port()), *own])
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with (root / "log").open("ab") as log:
            for command, *options in commands:
                start, environment = [str(BIN / command), *options], _environment(root)
                processes.append(
                    subprocess.Popen(
                        start, env=environment, stdout=log, stderr=log, start_new_session=True
                    )
                )
                wait_until(lambda: listens(port), "SuperLink")
        yield
    finally:
        for process in processes:
            signal_group(process, signal.SIGTERM)


def _environment(root: Path) -> dict[str, str]:
    own = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(root),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
    }
    return {**os.environ, **own}


def _cost(system: str, seconds: list[float], training: list[float]) -> Cost:
    beyond = [whole - part for whole, part in zip(seconds, training, strict=True)]
    steady = [statistics.median(each[1:]) for each in (seconds, training, beyond)]
    return Cost(system, steady[0], steady[1], steady[2], seconds[0])


def main() -> None:
    """Three federations after each other, and their rounds as a table."""
    parser = argparse.ArgumentParser(description="Seconds of a round beyond its training.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        sys.exit("--rounds: expected 2 or more: the first one is apart")
    with TemporaryDirectory() as folder:
        root = Path(folder)
        costs = [
            template(root / "template", arguments.rounds),
            ours(root / "clear", arguments.rounds, secure=False),
            ours(root / "masked", arguments.rounds, secure=True),
        ]
    table = Table("system", "a round s", "training s", "beyond it s", "first round s")
    for cost in costs:
        figures = (
            cost.round_seconds,
            cost.training_seconds,
            cost.beyond_seconds,
            cost.first_round_seconds,
        )
        table.add_row(cost.system, *(f"{figure:.1f}" for figure in figures))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps([asdict(cost) for cost in costs], indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
