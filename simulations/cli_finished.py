"""`fedlora-sim`'s commands for a run that goes on or has ended: watch, personalise, merge, …"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedlora.common.errors import BadInput

app = typer.Typer()
console = Console(highlight=False, markup=False)
Folder = Annotated[Path, typer.Argument(help="A run's folder, or its adapter folder.")]
Base = Annotated[str, typer.Option(help="Where the base model lies, if elsewhere.")]
Out = Annotated[Path, typer.Option("--out", help="A new folder.")]


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    port: Annotated[int, typer.Option(help="On loopback; 0: any that is free.")] = 0,
) -> None:
    """A live page of a run for this machine's browser: progress, ε, institutions, failures."""
    from fedlora.server.watch.live import Watching

    with Watching(folder, port) as page:
        console.print(f"page    {page.url}")
        page.serve_forever()


@app.command()
def personalise(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")] = 0,
    lora: Annotated[bool, typer.Option("--lora", help="LoRA's B too, above the same A.")] = False,
) -> None:
    """What each institution gains by a head of its own above the released adapter.

    Accuracy on the test file, each class weighted by its share of the
    institution's records; it joins the run's summary and report.
    """
    from fedlora.simulations import Options, personalise

    found = personalise(folder, Options(threads=threads), console.print, lora)
    titles = {"released": "released head", "own": "own heads", "adapter": "own heads and adapters"}
    for name, title in titles.items():
        if f"{name}_worst" not in found:
            continue
        worst, mean = found[f"{name}_worst"], found[f"{name}_mean"]
        console.print(f"{title}: worst institution {worst:.3f}, mean {mean:.3f}")


@app.command()
def merge(
    folder: Folder,
    out: Out,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    base: Base = "",
) -> None:
    """The released adapter added to its base: a whole model that loads without PEFT."""
    from fedlora.common.adapter.merged import merge_released

    merge_released(_adapter(folder), base, out, dtype)
    console.print(f"model   {out}")


@app.command()
def export(
    folder: Folder,
    out: Out,
    merged: Annotated[
        bool, typer.Option("--merge", help="Base and adapter as one model, as `merge` does.")
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Base, adapter and head as one ONNX graph.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of --merge: float32, bfloat16, …")] = "bfloat16",
    base: Base = "",
) -> None:
    """The released adapter for PEFT, checked and copied; with --merge or --onnx a whole model."""
    from fedlora.common.adapter.released import copy_released

    if merged and onnx:
        raise BadInput("found --merge and --onnx, expected one of them")
    if merged:
        merge(folder, out, dtype, base)
    elif onnx:
        _write_onnx(_adapter(folder), out, base)
    else:
        copy_released(_adapter(folder), out)
        console.print(f"adapter {out}")


@app.command()
def serve(
    folder: Folder,
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="An address of this machine.")] = "127.0.0.1",
    anywhere: Annotated[
        bool, typer.Option("--anywhere", help="Also where --host can be reached from outside.")
    ] = False,
    base: Base = "",
) -> None:
    """A local HTTP endpoint for trying a model: OpenAI's paths for prompts, /predict for the rest.

    It knows no users and no TLS.
    """
    from fedlora.common.adapter.peft import load_adapter
    from fedlora.simulations.serving.model_server import Serving

    adapter = _adapter(folder)
    with Serving(load_adapter(adapter, base), folder.resolve().name, port, host, anywhere) as at:
        console.print(f"answers {at.url}")
        at.serve_forever()


def _write_onnx(adapter: Path, out: Path, base: str) -> None:
    from fedlora.common.adapter.onnx_graph import write_onnx
    from fedlora.common.adapter.peft import load_adapter

    write_onnx(load_adapter(adapter, base), adapter, out)
    console.print(f"graph   {out}")


def _adapter(folder: Path) -> Path:
    return folder / "adapter" if (folder / "adapter").is_dir() else folder
