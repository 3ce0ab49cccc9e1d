"""Files that a run and its devices begin with: `init`, `enroll`."""

import json
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from ondevice import config as agent
from orchestrator import config
from orchestrator.commands.terminal import AsJson, Changes, ConfigFile, console
from orchestrator.fleet import enrolment
from wire import records, settings, signing, storage
from wire.errors import SettingsError, StillhouseError

PACKAGED = {"data": "/srv/stillhouse/images", "state": "/var/lib/stillhouse/state"}


def init(
    folder: Annotated[Path, typer.Argument(help="Where run.toml goes.")] = Path(),
    preset: Annotated[
        str,
        typer.Option(
            help=f"What to begin with: {', '.join(config.presets())}. {config.WHY_DEFAULT}"
        ),
    ] = config.DEFAULT,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented configuration."""
    text = config.template(preset, settings.parse(config.RunConfig, changes or ()))
    if changes:  # presets are known to be right
        from orchestrator import strategies

        try:
            strategies.check(records.of_table(config.RunConfig, tomllib.loads(text), "--set"))
        except SettingsError as fault:
            raise SettingsError(f"--set: {fault}") from fault
    path = folder / "run.toml"
    if path.exists():
        raise StillhouseError(f"{path} is there already; nothing was written")
    try:
        with storage.at(path):
            folder.mkdir(parents=True, exist_ok=True)
        storage.create(path, text)
    except (FileExistsError, NotADirectoryError) as fault:
        raise StillhouseError(f"{folder} is no folder; name another") from fault
    if as_json:
        print(json.dumps({"file": str(path), "preset": preset}))
        return
    console.print(f"{path} written; edit it, then: orchestrator start --config {path}")


def enroll(
    device: Annotated[str, typer.Argument(help="The device's name.")],
    *,
    config_file: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="The file to write.")] = None,
    url: Annotated[str, typer.Option(help="How the device reaches the broker.")] = "",
    packaged: Annotated[
        bool, typer.Option(help="With the folders of the package stillhouse-edge-agent.")
    ] = False,
    release_key: Annotated[
        str, typer.Option(help="Updates of the agent are signed by it; default: run.toml's.")
    ] = "",
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Admit a device and write its agent.toml; a running broker of ours lets it in at once."""
    chosen = config.load(config_file)
    if key := release_key or chosen.release.key:
        signing.check_public(key)
    path = out or Path(f"{device}.toml")
    if path.exists():
        raise StillhouseError(f"{path} is there already; name another with --out")
    url, notes = enrolment.reach(chosen.broker, url)
    values = {
        "device": device,
        "fleet": chosen.fleet,
        "image": chosen.device.input,
        "chunk_bytes": chosen.chunk_bytes,
        "release_key": key,
        "broker.url": url,
        "broker.username": device,
        **(PACKAGED if packaged else {}),
        **settings.parse(agent.AgentConfig, changes or ()),
    }
    agent.template(values)  # nobody is enrolled if it cannot be written
    password = enrolment.enroll(chosen.runs, chosen.fleet, device)
    try:
        storage.create(path, agent.template({"broker.password": password} | values), 0o600)
    except OSError as fault:
        raise StillhouseError(f"{path}: cannot be written: {fault.strerror}; name another with "
                              "--out") from fault  # fmt: skip
    if as_json:
        told = {"file": str(path), "device": device, "fleet": chosen.fleet, "url": url}
        print(json.dumps(told | {"notes": notes}))
        return
    console.print(
        f"{path} written, for the broker {url}; on the device: edge-agent run --config {path.name}"
    )
    for note in notes:
        console.print(f"note: {note}")
