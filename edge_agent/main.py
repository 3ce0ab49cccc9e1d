"""The agent of one device: trains on its images, in the rounds of a fleet."""

import argparse
import json
import logging
import sys
from pathlib import Path

from edge_agent.completion import PrintCompletion
from ondevice import config
from wire import __version__, logs, records, stopping, storage
from wire.errors import DataError, RefusedError, SettingsError, StillhouseError, StorageError
from wire.settings import parse

NO_IMAGES, NO_DISK, REFUSED = 3, 4, 5  # exit codes


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code.

    The code is 0, or after one line about the error 2 or one of the codes above. If a signal ends a
    command, it is 128 plus the signal's number; but the first signal ends `run` with 0.
    """
    if arguments is None:
        stopping.listen()
    return stopping.run(lambda: _main(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-agent", description=__doc__)
    parser.add_argument("--version", action="version", version=f"edge-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="join the fleet and work until stopped")
    run.set_defaults(do=_run)
    run.add_argument("--config", type=Path, required=True, help="agent.toml")
    run.add_argument("--verbose", action="store_true", help="say more")
    doctor = commands.add_parser("doctor", help="look for what keeps this device from taking part")
    doctor.set_defaults(do=_doctor)
    doctor.add_argument("--config", type=Path, default=Path("/etc/stillhouse/agent.toml"),
                        help="agent.toml; default: /etc/stillhouse/agent.toml")  # fmt: skip
    doctor.add_argument("--json", action="store_true", help="findings as JSON, for scripts")
    _add_measure(commands.add_parser("measure", help="what training costs on this device"))
    _add_predict(commands.add_parser("predict", help="say what is on photos"))
    init = commands.add_parser("init", help="write a commented configuration")
    init.set_defaults(do=_init)
    init.add_argument("file", type=Path, nargs="?", default=Path("agent.toml"),
                      help="where to; default: agent.toml")  # fmt: skip
    other = "another value in the file, such as threads=2; may be repeated"
    init.add_argument("--json", action="store_true", help="what was written as JSON, for scripts")
    init.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE",
                      help=other)  # fmt: skip
    parser.add_argument("--print-completion", action=PrintCompletion, commands=commands.choices,
                        help="lines for a shell's start-up file, and end")  # fmt: skip
    return parser


def _main(arguments: list[str] | None) -> int:
    parser = _parser()
    try:
        given = sys.argv[1:] if arguments is None else arguments
        chosen, more = parser.parse_known_args(records.expanded(given))
        if chosen.command == "predict":  # argparse takes paths only from one side of an option
            chosen.paths += (Path(text) for text in more if not text.startswith("-"))
            more = [text for text in more if text.startswith("-")]
        if more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        with storage.at(Path()):
            code: int = chosen.do(chosen)
            return code
    except StillhouseError as fault:
        print(f"edge-agent: {fault}", file=sys.stderr)
        # systemd starts the service again after these: images may arrive, a disk may be repaired or
        # released by another program, and a device may be enrolled. Settings need a person.
        codes = {StorageError: NO_DISK, DataError: NO_IMAGES, RefusedError: REFUSED}
        return next((code for kind, code in codes.items() if isinstance(fault, kind)), 2)
    except OSError as fault:
        if fault.filename is None:
            raise
        print(f"edge-agent: {fault.filename}: {fault.strerror}", file=sys.stderr)
        return NO_DISK


def _doctor(chosen: argparse.Namespace) -> int:
    from edge_agent import doctor

    return doctor.report(chosen.config, as_json=chosen.json)


def _init(chosen: argparse.Namespace) -> int:
    path: Path = chosen.file
    text = config.template(parse(config.AgentConfig, chosen.changes))
    if path.is_dir():
        raise SettingsError(f"{path} is a folder; name the file, {path / 'agent.toml'}, say")
    try:
        with storage.at(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        storage.create(path, text, 0o600)  # it will hold a password
    except OSError as fault:
        print(f"edge-agent: {path}: {fault.strerror}; nothing was written", file=sys.stderr)
        return 2
    told = f"{path} written; edit it, then: edge-agent run --config {path}"
    print(json.dumps({"file": str(path)}) if chosen.json else told)
    return 0


def _add_predict(command: argparse.ArgumentParser) -> None:
    command.usage = "edge-agent predict [-h] [--top N] [--json] (MODEL | --config FILE) PHOTO ..."
    command.set_defaults(do=_predict)
    add = command.add_argument
    paths = "an .onnx file that `orchestrator export` wrote, then photos and folders of photos"
    own = "agent.toml; instead of an .onnx file, the network that this device trained last"
    add("paths", type=Path, nargs="+", metavar="PATH", help=paths)
    add("--config", type=Path, metavar="FILE", help=own)
    add("--top", type=int, default=1, metavar="N", help="how many classes of each photo")
    add("--json", action="store_true", help="a JSON list")


def _predict(chosen: argparse.Namespace) -> int:
    from ondevice import predict

    if chosen.config is None and len(chosen.paths) < 2:
        raise SettingsError(
            f"predict: expected a model and photos, got {chosen.paths[0]} alone; name the .onnx "
            "file first, or agent.toml with --config"
        )
    network: predict.Network
    if chosen.config is not None:
        from edge_agent.own_network import OwnNetwork

        settings, files = config.load(chosen.config), chosen.paths
        network = OwnNetwork(settings.state, threads=settings.threads)
    else:
        network, files = predict.Exported(chosen.paths[0]), chosen.paths[1:]
    return predict.report(network, files, top=chosen.top, as_json=chosen.json)


def _add_measure(command: argparse.ArgumentParser) -> None:
    command.set_defaults(do=_measure)
    add = command.add_argument
    add("--artifact", type=Path, help="folder of the artifact; default: the package's "
        "ResNet-8, or else the one that came with this device's last run")  # fmt: skip
    add("--budget-mb", type=int, default=0, help="for the largest batch; 0: what is available now")
    add("--threads", type=int, default=0, help="0 takes all cores")
    add("--steps", type=int, default=20, help="that are timed")
    add("--with-pytorch", action="store_true", help="PyTorch at the same step beside, in turns")
    add("--model", default="", help="for --with-pytorch, a network of your own: nets.py:make")
    add("--json", type=Path, help="write all figures there, signed; - prints them alone")
    add("--roofline", type=Path, help="draw a .png there; the terminal tells the same")
    add("--config", type=Path, help="agent.toml; default: the installed one, if it can be read")
    add("--submit", action="store_true", help="send the report to the orchestrator")
    add("--timeout", type=float, default=30.0, help="seconds to wait for its receipt")


def _measure(chosen: argparse.Namespace) -> int:
    from edge_agent.field import identity
    from edge_agent.field import measure as measuring
    from ondevice import roofline
    from wire import measurement, signing
    from wire.artifact import open_artifact

    if chosen.threads < 0 or chosen.steps < 1 or chosen.budget_mb < 0 or not chosen.timeout > 0:
        raise SettingsError(
            "expected --threads and --budget-mb of 0 or more, --steps of 1 or more, --timeout over "
            "0"
        )
    # Check what is cheap to check before anything is measured.
    settings = identity.settings(chosen.config)
    if chosen.submit and settings is None:
        raise SettingsError(
            f"--submit: {identity.INSTALLED} is not there, or not for this user; name the device's "
            "agent.toml with --config, or run this as its user: sudo -u stillhouse edge-agent ..."
        )
    to_stdout = chosen.json == Path("-")
    for path in filter(None, (None if to_stdout else chosen.json, chosen.roofline)):
        if not path.parent.is_dir():
            raise SettingsError(f"{path}: {path.parent} is no folder; make it")
        if path.is_dir():
            raise SettingsError(f"{path} is a folder; name a file in it")
    if chosen.roofline:
        roofline.check(chosen.roofline)
    artifact = open_artifact(
        chosen.artifact or measuring.default_artifact(settings.state if settings else None)
    )
    key = identity.key_file(settings)
    _hold_threads(chosen.threads)
    measured = measuring.measure(
        artifact,
        threads=chosen.threads,
        steps=chosen.steps,
        budget=chosen.budget_mb * 10**6,
        name=settings.device if settings else "",
        with_pytorch=chosen.with_pytorch,
        model=chosen.model,
    )
    report = measurement.sign(signing.own_key(key), measured)
    figures = json.dumps(records.plain(report), indent=1)
    print(figures if to_stdout else measuring.text(report))
    try:
        if chosen.json and not to_stdout:
            chosen.json.write_text(figures + "\n")
        if chosen.roofline:
            roofline.draw(chosen.roofline, report)
    except OSError as fault:
        raise SettingsError(f"{fault.filename}: cannot be written: {fault.strerror}") from fault
    if chosen.submit and settings:
        from edge_agent.field.submit import submit

        submit(report, settings, chosen.timeout)
        print(
            f"submitted as {settings.device} to the orchestrator of fleet {settings.fleet}",
            file=sys.stderr if to_stdout else sys.stdout,
        )
    return 0


def _run(chosen: argparse.Namespace) -> int:
    from edge_agent.service import serve

    logs.to_stream(level=logging.DEBUG if chosen.verbose else logging.INFO)
    settings = config.load(chosen.config)
    _hold_threads(settings.threads)
    try:
        serve(settings)
    except RefusedError as fault:
        raise RefusedError(f"{fault}. As a service it tries again every 15 s") from fault
    return 0


def _hold_threads(number: int) -> None:
    """Limit the threads of numpy's matrix products to `number`; 0 sets no limit."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    if number:
        threadpool_limits(number, user_api="blas")


if __name__ == "__main__":
    sys.exit(main())
