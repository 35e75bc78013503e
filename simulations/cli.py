"""`fedlora-sim`, the researcher's command line: reads arguments, shows progress, prints results."""

from __future__ import annotations

import codecs
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedlora.common.disk.files import text_of
from fedlora.common.errors import BadInput
from fedlora.common.privacy.figures import shown_epsilon
from fedlora.common.terminal import run_to_end
from fedlora.simulations.cli_finished import app as finished
from fedlora.simulations.federation.packaged import packaged_config

if TYPE_CHECKING:  # torch is loaded by the commands that need it
    from fedlora.simulations import Config, Options, Result

app = typer.Typer(
    help="Private federated fine-tuning of LoRA adapters, simulated on one machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(finished)
console = Console(highlight=False, markup=False)
ConfigFile = Annotated[
    Path, typer.Argument(help="A TOML file, or the name of a packaged configuration (ag_news).")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key: section.key=VALUE.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder.")]
Threads = Annotated[
    int, typer.Option(min=0, max=1024, help="CPU threads; 0 leaves the choice to torch.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
LedgerFile = Annotated[Path | None, typer.Option("--ledger", help="A ledger shared between runs.")]


@app.command()
def run(
    config: Annotated[
        Path | None,
        typer.Argument(help="A TOML file, or the name of a packaged configuration (ag_news)."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Records to train on: .csv, .jsonl or .parquet.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Public records; without it a tenth of --train.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="The column with the text; twice for a pair.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column with the label.")] = None,
    epsilon: Annotated[str | None, typer.Option(help='A number, or "none".')] = None,
    base: Annotated[str | None, typer.Option(help="A folder, a package, or a hub id.")] = None,
    clients: Annotated[int | None, typer.Option(help="Institutions.")] = None,
    task: Annotated[str | None, typer.Option(help="What is trained: regression, say.")] = None,
    set_: Overrides = None,
    engine: Annotated[str, typer.Option(help="sequential or ray.")] = "sequential",
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    ledger: LedgerFile = None,
    device: Device = "auto",
    gpu_share: Annotated[
        float, typer.Option(help="Of a GPU, for each worker of --engine ray; 0: chosen.")
    ] = 0.0,
    threads: Threads = 0,
) -> None:
    """Run a federation and write its report: of a configuration, or of --train with defaults."""
    from fedlora.simulations import Options, load_config
    from fedlora.simulations.experiments.configuration import described

    if config is None and train is None:
        raise BadInput("run: found neither a configuration nor --train, expected one")
    columns = {"data_text": tuple(text) if text else None, "data_label": label}
    model = {"model_base": base, "model_task": task}
    given = described(train, test, epsilon, **columns, **model, federation_clients=clients)
    folder = out or Path("runs") / (packaged_config(config) if config else train or Path()).stem
    options = Options(engine, device, threads, resume, ledger, gpu_share)
    result = _watched(load_config(config, [*given, *(set_ or [])]), folder, options)
    _print_summary(result.summary, folder)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Where to write.")] = Path("runs/quickstart"),
    threads: Threads = 0,
) -> None:
    """A private federation on a synthetic corpus: no network, no configuration, a few minutes."""
    from fedlora.simulations.experiments.quickstart import run_quickstart

    summary = run_quickstart(out, console, threads)
    _print_summary(summary, out)


@app.command()
def check(config: ConfigFile, set_: Overrides = None) -> None:
    """What was understood of configuration and data, and what rules chose; nothing is spent."""
    from fedlora.simulations import check as checked

    console.print(checked(_load(config, set_)))


@app.command()
def plan(config: ConfigFile, set_: Overrides = None, threads: Threads = 0) -> None:
    """σ, ε by round, examples, minutes and bytes: before anything is spent."""
    from fedlora.simulations import Options
    from fedlora.simulations import plan as planned

    console.print(planned(_load(config, set_), Options(threads=threads)))


@app.command()
def sweep(
    config: ConfigFile,
    over: Annotated[list[str], typer.Option(help="section.key=VALUE,VALUE,… of one key")],
    set_: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """One run for each value, and the curve over them. The trials themselves are not accounted."""
    from fedlora.simulations import Options
    from fedlora.simulations import sweep as swept

    if len(over) != 1:
        raise BadInput(f"--over: found {len(over)} keys, expected one")
    key, values = _over(over[0])
    folder = out or Path("runs") / f"{packaged_config(config).stem}-sweep"

    def run(settings: Config, folder: Path, options: Options) -> Result:
        console.print(folder.name, style="bold")
        return _watched(settings, folder, options)

    options = Options(device=device, threads=threads)
    found = swept(_load(config, set_), key, values, folder, options, run)
    console.print(f"curve   {found.page}")


@app.command()
def compare(
    config: ConfigFile,
    methods: Annotated[
        str,
        typer.Option(
            help="Of given (the file as it is), head, lora, head+lora, ffa, rolora, flexlora and "
            "central: several by commas."
        ),
    ] = "head,lora,head+lora",
    epsilon: Annotated[str, typer.Option(help='Numbers, or "none".')] = "1,3,8,none",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, from the file's seed on.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    set_: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Several methods, ε and seeds: a table of means and spreads, and a picture."""
    from fedlora.simulations import Options
    from fedlora.simulations import compare as compared

    folder = out or Path("runs") / f"{packaged_config(config).stem}-compare"
    found = compared(
        _load(config, set_),
        folder,
        Options(device=device, threads=threads),
        methods=_listed(methods),
        epsilons=[_epsilon(each) for each in _listed(epsilon)],
        seeds=seeds,
        workers=workers,
        on_trial=lambda name, _: console.print(f"done    {name}"),
    )
    console.print(found)
    console.print(f"table   {found.page}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write report.html again, from the run's files."""
    from fedlora.simulations.report.pages import write_report

    console.print(f"report  {write_report(folder)}")


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or its adapter folder.")],
    file: Annotated[Path, typer.Argument(help="One text, or path, to a line.")],
    base: Annotated[str, typer.Option(help="Where the base model lies, if elsewhere.")] = "",
) -> None:
    """The released adapter on new text: one JSON object to a line."""
    from fedlora.common.adapter.peft import load_adapter
    from fedlora.common.data.tagged import WORDS
    from fedlora.common.tasks.task import WORD

    adapter = folder / "adapter" if (folder / "adapter").is_dir() else folder
    lines = _lines(file)
    loaded = load_adapter(adapter, base)
    task = loaded.model.task
    media = task.medium is not None
    inputs: list[Any] = lines if media else [_input(line) for line in lines]
    asked = [file.parent / line for line in lines] if media else inputs
    words = task.asked(asked).parts[WORDS] if task.reads == WORD else ()
    # elsewhere a letter that an encoding lacks would be printed as "?"
    ascii_alone = codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8"
    for row, (text, answer) in enumerate(zip(inputs, loaded.predict(asked), strict=True)):
        whose = {"words": words[row][: len(answer)]} if words else {}  # of which the tags are
        line = json.dumps({"text": text, **whose, "answer": answer}, ensure_ascii=ascii_alone)
        sys.stdout.write(line + "\n")


def main() -> None:
    """Entry point: errors are one line to a fault, and the exit code says what kind they are."""
    run_to_end(app, "fedlora-sim", lambda: _stopped(sys.argv[1:]))


def _stopped(words: list[str]) -> str:
    """What a person who pressed Ctrl-C can do next."""
    if not words or words[0] != "run":
        return "stopped; the same command begins again"
    again = words if "--resume" in words else [*words, "--resume"]
    return (
        "stopped; where no run had begun the same command begins again, else go on from the last"
        f" committed round with: fedlora-sim {shlex.join(again)}"
    )


def _load(config: Path, overrides: list[str] | None) -> Config:
    from fedlora.simulations import load_config

    return load_config(config, overrides or [])


def _watched(settings: Config, folder: Path, options: Options) -> Result:
    """A simulation with bars on the terminal."""
    from fedlora.simulations import simulate
    from fedlora.simulations.experiments.progress import run_progress

    with run_progress(console) as bars:
        return simulate(settings, folder, options, on_round=bars.round, on_features=bars.features)


def _over(over: str) -> tuple[str, list[str]]:
    key, equals, listed = over.partition("=")
    values = _listed(listed)
    if not equals or not values or "." not in key:
        raise BadInput(f"--over {over}: expected section.key=VALUE,VALUE,…")
    return key.strip(), values


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _epsilon(word: str) -> float | None:
    try:
        return None if word == "none" else float(word)
    except ValueError as error:
        raise BadInput(f'--epsilon {word}: expected numbers, or "none"') from error


def _lines(file: Path) -> list[str]:
    """What stands before each line feed, and behind the last one: whatever else it holds."""
    expected = "a file of UTF-8, one text to a line"
    try:
        text = text_of(file.read_bytes(), str(file), expected, "utf-8-sig")
    except OSError as error:
        raise BadInput(f"{file}: can't be read ({error.strerror}), expected {expected}") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise BadInput(f"{file}: found no text, expected one to a line")
    return lines


def _input(line: str) -> Any:
    """A text; a line that is a JSON list is a pair of texts, a list of words or a conversation."""
    try:
        found = json.loads(line) if line.startswith(("[", "{")) else line
    except (ValueError, RecursionError):
        return line
    if isinstance(found, dict):
        raise BadInput(f"{line[:60]}…: found a JSON object, expected one text to a line")
    listed = isinstance(found, list) and found and all(isinstance(x, str | dict) for x in found)
    return found if listed else line


def _print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in (
        "accuracy",
        "entity_f1",
        "micro_f1",
        "macro_f1",
        "spearman",
        "pearson",
        "perplexity",
        "loss",
        "epsilon",
        "delta",
        "rounds",
        "seconds",
    ):
        if summary.get(name) is not None:
            value = summary[name]
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(name, shown_epsilon(value) if name == "epsilon" else shown)
    for sentence in summary.get("warnings", ()):
        table.add_row("warning", sentence)
    table.add_row("adapter", str(folder / "adapter"))
    table.add_row("report", str(folder / "report.html"))
    console.print(table)


if __name__ == "__main__":
    main()
