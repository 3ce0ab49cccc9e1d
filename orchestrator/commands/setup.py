"""Commands that write the files of a run and its devices: `init`, `enroll`, `revoke`, `renew`."""

import json
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ondevice import config as agent
from orchestrator import config
from orchestrator.commands.terminal import (
    AgentChanges,
    AsJson,
    ConfigFile,
    RunChanges,
    console,
)
from orchestrator.fleet import certificates, enrolment
from orchestrator.fleet.authority import CLAIM_DAYS
from wire import address, records, settings, signing, storage
from wire.errors import SettingsError, StillhouseError
from wire.names import anchored

PACKAGED = {"data": "/srv/stillhouse/images", "state": "/var/lib/stillhouse/state"}
PEM_FILES = {"broker.ca_file", "broker.cert_file", "broker.key_file"}
# Settings of a device that `enroll --set` refuses, and why.
FIXED = {
    "device": "the name is the argument of enroll: orchestrator enroll NAME",
    "fleet": "a device is enrolled in the fleet of run.toml; name another run.toml with --config",
    "broker.username": "a device logs in under the name that it is enrolled by",
    "broker.password": "enroll draws it, and the broker lets the device in by no other",
    "kit.authority": "it is that of the fleet",
    "kit.claim": "enroll makes it, for this device alone",
    "kit.signer": "it is that of the fleet",
}


def init(
    folder: Annotated[Path, typer.Argument(help="Where run.toml goes.")] = Path(),
    preset: Annotated[
        str,
        typer.Option(
            help=f"What to begin with: {', '.join(config.presets())}. {config.WHY_DEFAULT}"
        ),
    ] = config.DEFAULT,
    changes: RunChanges = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented configuration."""
    text = config.template(preset, settings.parse(config.RunConfig, changes or ()))
    if changes:  # a preset without changes needs no check
        from orchestrator import strategies
        from orchestrator.launch import networks

        chosen = records.of_table(config.RunConfig, tomllib.loads(text), "--set")
        # As `config.load` will: a path to a user's strategy is relative to run.toml's folder.
        chosen = replace(chosen, strategy=anchored(chosen.strategy, folder))
        try:
            strategies.check(chosen)
            networks.check_names(chosen)
        except StillhouseError as fault:
            raise SettingsError(f"--set: {fault}") from fault
    path = folder / "run.toml"
    if path.exists():
        raise StillhouseError(f"{path} is there already; nothing was written")
    try:
        with storage.at(path):
            folder.mkdir(parents=True, exist_ok=True)
        storage.create(path, text, 0o600)  # it may hold the broker's password
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
    days: Annotated[
        float,
        typer.Option(
            min=0.01, max=3650, help="The kit's claim for a certificate ends after these."
        ),
    ] = CLAIM_DAYS,
    changes: AgentChanges = None,
    as_json: AsJson = False,
) -> None:
    """Admit a device and write its agent.toml; a running broker of ours lets it in at once."""
    enrolment.check_name(device)
    others = _others(changes or (), url)
    chosen = config.load(config_file)
    if key := release_key or chosen.release.key:
        signing.check_public(key)
    path = out or Path(f"{device}.toml")
    if path.exists():
        raise StillhouseError(f"{path} is there already; name another with --out")
    if other_url := others.pop("broker.url", ""):
        url, notes = enrolment.reach(chosen.broker, other_url, "--set broker.url")
    else:
        url, notes = enrolment.reach(chosen.broker, url)
    values = {
        "device": device,
        "fleet": chosen.fleet,
        "image": chosen.device.input,
        "chunk_bytes": chosen.chunk_bytes,
        "release_key": key,
        "broker.url": url,
        **(PACKAGED if packaged else {}),
        **others,
    }
    password = enrolment.password(chosen.runs, chosen.fleet, device)
    if chosen.broker.mutual_tls:
        if given := others.keys() & PEM_FILES:
            raise SettingsError(f"--set {min(given)}: the kit replaces it; leave it out")
        host = address.parse(url).host
        notes.append(
            f"within {days:g} days, start the agent while a run goes on: then it gets its "
            "certificate, and nobody else can use this file"
        )
        secrets = certificates.kit(chosen.runs, chosen.fleet, device, host, days)
    else:
        secrets = {"broker.username": device, "broker.password": password}
    try:
        storage.create(path, agent.template(values | secrets), 0o600)
    except OSError as fault:
        raise StillhouseError(f"{path}: cannot be written: {fault.strerror}; name another with "
                              "--out") from fault  # fmt: skip
    try:  # last, so that a device whose file cannot be written is not enrolled
        enrolment.enroll(chosen.runs, chosen.fleet, device, password)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if as_json:
        told = {"file": str(path), "device": device, "fleet": chosen.fleet, "url": url}
        print(json.dumps(told | {"notes": notes}))
        return
    console.print(
        f"{path} written, for the broker {url}; on the device: edge-agent run --config {path.name}"
    )
    for note in notes:
        console.print(f"note: {note}")


def revoke(
    device: Annotated[str, typer.Argument(help="The device's name.")],
    *,
    config_file: ConfigFile,
    as_json: AsJson = False,
) -> None:
    """Turn a device out of the fleet; if a run is going on, it takes effect within seconds."""
    chosen = config.load(config_file)
    if chosen.admission == "open":
        raise StillhouseError(
            'admission = "open" in run.toml takes any device that the broker lets in; set '
            '"enrolled", and enroll the others'
        )
    enrolment.check(chosen.runs, chosen.fleet, device)
    certificates.revoke(chosen.runs, chosen.fleet, device)
    enrolment.revoke(chosen.runs, chosen.fleet, device)
    if as_json:
        print(json.dumps({"device": device, "fleet": chosen.fleet}))
        return
    console.print(f"{device} is no longer enrolled in fleet {chosen.fleet}")
    if chosen.broker.kind == "external":
        console.print("note: remove its user from your broker too")


def renew(
    device: Annotated[str, typer.Argument(help="The device's name.")],
    *,
    config_file: ConfigFile,
    as_json: AsJson = False,
) -> None:
    """Let a device make a new key and get a new certificate, before its time."""
    chosen = config.load(config_file)
    certificates.renew(chosen.runs, chosen.fleet, device)
    if as_json:
        print(json.dumps({"device": device, "fleet": chosen.fleet}))
        return
    console.print(f"{device} gets a new certificate when a run goes on and it is there")


def _others(changes: Iterable[str], url: str) -> dict[str, Any]:
    """The settings of `enroll --set`, for the device's file.

    Raises:
        SettingsError: a value cannot be read, or its key cannot be set this way.
    """
    others = settings.parse(agent.AgentConfig, changes)
    for key in others:
        if key in FIXED:
            raise SettingsError(f"--set {key}: {FIXED[key]}")
    if url and "broker.url" in others:
        raise SettingsError(
            "--url and --set broker.url both say how the device reaches the broker; leave one out"
        )
    return others
