"""The command `orchestrator`."""

import enum
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestrator import config
from orchestrator.display import view, words
from wire import __version__, records, stopping, storage
from wire.errors import StillhouseError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]
# Texts are printed as they are: paths are not wrapped, and names hold no markup.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def orchestrator(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """The server of a fleet: runs its rounds, and keeps what it has learnt."""
    del version


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where run.toml goes.")] = Path(),
    preset: Annotated[
        str,
        typer.Option(
            help=f"What to begin with: {', '.join(config.presets())}. {config.WHY_DEFAULT}"
        ),
    ] = config.DEFAULT,
) -> None:
    """Write a commented configuration."""
    text = config.template(preset)
    path = folder / "run.toml"
    if path.exists():
        raise StillhouseError(f"{path} is there already; nothing was written")
    try:
        with storage.at(path):
            folder.mkdir(parents=True, exist_ok=True)
        storage.create(path, text)
    except (FileExistsError, NotADirectoryError) as fault:
        raise StillhouseError(f"{folder} is no folder; name another") from fault
    console.print(f"{path} written; edit it, then: orchestrator start --config {path}")


@app.command()
def start(
    config_file: Annotated[Path, typer.Option("--config", help="run.toml")],
) -> None:
    """Do a run, or go on with one that was stopped."""
    from orchestrator import strategies
    from orchestrator.launch import start
    from orchestrator.training import ranks

    chosen = config.load(config_file, strategies.check)
    with ranks.joined(chosen.server) as group:
        if group and group.rank:
            stopping.at_once()
            group.serve()
            return
        with view.Display(console) as show:
            report = start.run(chosen, changed=show)
    console.print(view.rounds(report.entries))
    console.print()
    console.print(view.agents(report.entries))
    console.print(f"report: {chosen.folder / 'report.json'}")


@app.command()
def simulate(
    config_file: Annotated[Path, typer.Option("--config", help="run.toml")],
    shards: Annotated[Path, typer.Option(help="Folder of device-*.npz, one a device.")],
    stack: Annotated[
        int, typer.Option(help="Devices trained at once; 0: one on a CPU, all on a GPU.", min=0)
    ] = 0,
    threads: Annotated[int, typer.Option(help="Of PyTorch and numpy; 0: all cores.", min=0)] = 0,
    late: Annotated[float, typer.Option(help="Share of devices that miss a round's end.")] = 0.0,
) -> None:
    """Do a run with its devices simulated in this process, by PyTorch."""
    from orchestrator import strategies
    from orchestrator.simulation import simulate as simulation
    from orchestrator.training import ranks

    chosen = config.load(config_file, strategies.check)
    if threads:
        simulation.hold_threads(threads)
    with ranks.joined(chosen.server) as group:
        if group and group.rank:
            stopping.at_once()
            group.serve()
            return
        with view.Display(console, simulated=True) as show:
            report = simulation.run(chosen, shards, stack=stack, late=late, told=show)
    console.print(view.rounds(report.entries))
    console.print(f"report: {chosen.folder / 'report.json'}")


@app.command()
def enroll(  # noqa: PLR0917 - typer makes options of them
    device: Annotated[str, typer.Argument(help="The device's name.")],
    config_file: Annotated[Path, typer.Option("--config", help="run.toml")],
    out: Annotated[Path | None, typer.Option(help="The file to write.")] = None,
    url: Annotated[str, typer.Option(help="How the device reaches the broker.")] = "",
    packaged: Annotated[
        bool, typer.Option(help="With the folders of the package stillhouse-edge-agent.")
    ] = False,
    release_key: Annotated[
        str, typer.Option(help="Updates of the agent are signed by it; default: run.toml's.")
    ] = "",
) -> None:
    """Admit a device and write its agent.toml; a running broker of ours learns it at its start."""
    from ondevice.config import TEMPLATE
    from orchestrator.fleet import enrolment
    from wire import signing

    chosen = config.load(config_file)
    if key := release_key or chosen.release.key:
        signing.check_public(key)
    path = out or Path(f"{device}.toml")
    if path.exists():
        raise StillhouseError(f"{path} is there already; name another with --out")
    url, notes = enrolment.reach(chosen.broker, url)
    password = enrolment.enroll(chosen.runs, chosen.fleet, device)
    text = (
        TEMPLATE.replace('"device-0" ', json.dumps(device) + " ")
        .replace('"fleet"  ', json.dumps(chosen.fleet) + "  ")
        .replace('"mqtt://localhost:1883"', json.dumps(url))
        .replace('username = "" ', f"username = {json.dumps(device)} ")
        .replace('password = ""', f"password = {json.dumps(password)}")
        .replace('release_key = "" ', f"release_key = {json.dumps(key)} ")
        .replace("chunk_bytes = 131072", f"chunk_bytes = {chosen.chunk_bytes}")
        .replace("[3, 32, 32]", json.dumps(list(chosen.device.input)))
    )
    if packaged:
        text = text.replace('"images"', '"/srv/stillhouse/images"')
        text = text.replace('"state"', '"/var/lib/stillhouse/state"')
    try:
        storage.create(path, text, 0o600)
    except OSError as fault:
        raise StillhouseError(f"{path}: cannot be written: {fault.strerror}; name another with "
                              "--out") from fault  # fmt: skip
    console.print(
        f"{path} written, for the broker {url}; on the device: edge-agent run --config {path.name}"
    )
    for note in notes:
        console.print(f"note: {note}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: AsJson = False,
) -> None:
    """Show how far a run is."""
    path = run / "status.json"
    try:
        snapshot: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise StillhouseError(f"{run} holds no run; look for it under the `runs` folder") from fault
    except ValueError as fault:
        raise StillhouseError(
            f"{path} is damaged ({fault}); remove it, a run that goes on writes it anew"
        ) from fault
    if as_json:
        print(json.dumps(snapshot))
        return
    console.print(view.live(snapshot, console.width))
    console.print(f"as of {time.time() - snapshot['updated']:.0f} s ago", style="dim")


@app.command()
def devices(
    config_file: Annotated[Path, typer.Option("--config", help="run.toml")],
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the fleet's devices, and what training costs on each; times are UTC."""
    from orchestrator.display import devices as display
    from orchestrator.fleet import devices

    chosen = config.load(config_file)
    found = devices.known(chosen.runs, chosen.fleet)
    if markdown:
        print(display.markdown(found), end="")
    elif as_json:
        print(json.dumps(display.plain(found)))
    else:
        console.print(display.table(found, console.width))


@app.command()
def measure_report(
    config_file: Annotated[Path, typer.Option("--config", help="run.toml")],
    out: Annotated[Path | None, typer.Option(help="Folder; default: beside the reports.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write what training costs on the fleet's devices: Markdown and pictures."""
    from orchestrator.display import devices as display
    from orchestrator.fleet import devices

    chosen = config.load(config_file)
    found = devices.known(chosen.runs, chosen.fleet)
    folder = out or chosen.runs / f"measured-{chosen.fleet}" / "report"
    title = f"Devices of fleet {chosen.fleet}"
    paths = display.write_report(found, title, folder)
    if as_json:
        print(json.dumps({"files": [str(path) for path in paths]}))
        return
    for path in paths:
        console.print(f"{path} written")


class _Form(enum.StrEnum):
    float32 = "float32"
    uint8 = "uint8"


@app.command()
def export(  # noqa: PLR0917 - typer makes options of them
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
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


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="An .onnx file that `export` wrote.")],
    photos: Annotated[list[Path], typer.Argument(help="Photos, and folders of photos.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes of each photo.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what is on photos; the exit code is 1 where one cannot be read."""
    from ondevice import predict as predicting

    network = predicting.Exported(model)
    raise typer.Exit(predicting.report(network, photos, top=top, as_json=as_json))


@app.command(
    "compile",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def compile_step(context: typer.Context) -> None:
    """Compile a network's training step for devices; as `python -m tools.export` does."""
    from tools.export import __main__ as exporter

    raise typer.Exit(exporter.main(context.args, "orchestrator compile"))


@app.command()
def demo(  # noqa: PLR0917 - typer makes options of them
    data: Annotated[
        str, typer.Option(help="digits, cifar10, cifar100, mnist, ..., or a path.")
    ] = "digits",
    heldout: Annotated[
        Path | None, typer.Option(help="The held-out file of a --data path.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Resize the images, such as 32x32.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Agents, a process each.")] = 4,
    samples: Annotated[int | None, typer.Option(help="Images a device; default all.")] = None,
    heldout_samples: Annotated[
        int | None, typer.Option(help="Held-out images; default all.")
    ] = None,
    split: Annotated[str, typer.Option(help="iid or dirichlet.")] = "iid",
    alpha: Annotated[float, typer.Option(help="Of the Dirichlet split.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="Of the run.")] = 6,
    model: Annotated[
        str, typer.Option(help="Of the devices: a known one, or your own, nets.py:make@features.3.")
    ] = "resnet8",
    server_model: Annotated[
        str, typer.Option(help="Of the server: a known one, or your own, nets.py:large.")
    ] = "resnet10",
    server_epochs: Annotated[int, typer.Option(min=1, help="Of the server, a round.")] = 4,
    server_alpha: Annotated[float, typer.Option(help="Weight of the devices' logits.")] = 0.1,
    epochs: Annotated[int, typer.Option(min=1, help="Of the devices, a round.")] = 4,
    batch: Annotated[int, typer.Option(help="Images in a step of the devices.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of the devices.")] = 0.02,
    features: Annotated[str, typer.Option(help="Codec of feature maps.")] = "identity|q=8",
    augment: Annotated[bool, typer.Option(help="Random crops and flips.")] = False,
    broker: Annotated[str, typer.Option(help="embedded or mosquitto.")] = "embedded",
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    name: Annotated[str, typer.Option(help="Of the run, and of its folder.")] = "demo",
    seed: Annotated[int, typer.Option(help="Same seed, same split and weights.")] = 0,
    floor: Annotated[bool, typer.Option(help="Train the devices alone as well.")] = True,
) -> None:
    """Teach a large model on this machine: broker, orchestrator, and agents as processes."""
    from orchestrator import datasets
    from orchestrator import demo as demonstration
    from wire.errors import SettingsError

    def settings(cls: type[Any], **values: Any) -> Any:
        return records.build(cls, values, where="demo", error=SettingsError)

    plan = demonstration.Plan(
        source=data,
        heldout=heldout,
        devices=devices,
        per_device=samples,
        heldout_samples=heldout_samples,
        split=split,  # type: ignore[arg-type]  # datasets.build checks it
        alpha=alpha,
        rounds=rounds,
        server=settings(
            config.ServerConfig, model=server_model, epochs=server_epochs, alpha=server_alpha
        ),
        device=settings(
            config.DeviceConfig,
            model=model,
            epochs=epochs,
            batch=batch,
            lr=lr,
            features=features,
            augment=augment,
        ),
        broker=settings(config.BrokerConfig, kind=broker, port=0),
        runs=runs,
        name=demonstration.free_name(runs, name),
        seed=seed,
        floor=floor,
        size=None if size is None else datasets.parse_size(size),
    )
    with view.Display(console) as show:
        taught, alone = demonstration.play(plan, show)
    console.print(view.rounds(taught.entries))
    console.print()
    console.print(view.agents(taught.entries))
    last = taught.entries[-1]
    console.print(f"\nlarge model on held-out images   {words.percent(last['server_accuracy'])}")
    console.print(f"small model that devices share   {words.percent(last['device_accuracy'])}")
    if alone:
        best = words.percent(alone.entries[-1]["device_accuracy"])
        console.print(f"devices trained alone            {best}")
    console.print(f"\nreport: {runs / plan.name / 'report.json'}")


def main() -> None:
    """Run the command line; the exit code is 0, or 2 with one line on what is wrong.

    A signal that ends a command gives 128 and its number.
    """
    stopping.listen()
    sys.exit(stopping.run(_main))


def _main() -> int:
    try:
        with storage.at(Path()):
            app(records.expanded(sys.argv[1:]))
    except StillhouseError as fault:
        print(f"orchestrator: {fault}", file=sys.stderr)
        return 2
    except OSError as fault:
        if fault.filename is None:
            raise
        print(f"orchestrator: {fault.filename}: {fault.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    main()
