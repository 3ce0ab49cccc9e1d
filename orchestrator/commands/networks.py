"""Commands on networks: `export`, `predict`, `compile`."""

import enum
import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.terminal import AsJson, console


class _Form(enum.StrEnum):
    float32 = "float32"
    uint8 = "uint8"


def export(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    *,
    out: Annotated[
        Path, typer.Option(help="The .onnx file to write; one that is there is replaced.")
    ],
    device: Annotated[
        str | None, typer.Option(help="Whose extractor or network (fedgkt, local); default: best.")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="A device's small network, not the large one.")
    ] = False,
    form: Annotated[
        _Form,
        typer.Option(
            "--input",
            help="What the graph takes: float32 (N, C, H, W) of 0 to 1, or of 0 to 255; or raw "
            "pixels, uint8 (N, H, W, C).",
        ),
    ] = _Form.float32,
    as_json: AsJson = False,
) -> None:
    """Write what a run has learnt as one ONNX graph, pixels to logits."""
    from orchestrator.deploy.export import export_run

    done = export_run(run, out, device, small=small, form=form.value)
    if as_json:
        print(json.dumps(done.plain))
        return
    console.print(done.text)


def predict(
    model: Annotated[Path, typer.Argument(help="An .onnx file that `export` wrote.")],
    photos: Annotated[list[Path], typer.Argument(help="Photos, and folders of photos.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes of each photo.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what is on photos. The exit code is 1 if a photo cannot be read."""
    from ondevice import predict as predicting

    network = predicting.Exported(model)
    raise typer.Exit(predicting.report(network, photos, top=top, as_json=as_json))


def compile_step(context: typer.Context) -> None:
    """Compile a network's training step for devices; as `python -m tools.export` does."""
    from tools.export import __main__ as exporter

    raise typer.Exit(exporter.main(context.args, "orchestrator compile"))
