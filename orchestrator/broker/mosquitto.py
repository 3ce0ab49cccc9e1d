"""The configuration of our Mosquitto; every option exists in 2.0 and in 2.1."""

import os
import shutil
from pathlib import Path

SBIN = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")  # often not on a user's PATH
# Far above a 128 KiB chunk. The default limit is 2,000,000 bytes in 2.1 and 256 MB in 2.0.
MAX_PACKET_BYTES = 1 << 20
# Beyond either limit Mosquitto drops messages silently, so both allow a client a day's absence.
MAX_QUEUED_MESSAGES = 20_000
MAX_QUEUED_BYTES = 256 << 20
MAX_INFLIGHT = 64  # chunks of 128 KiB: 8 MiB under way to one client
AUTOSAVE_S = 5  # a crash loses at most what came since


def find() -> Path | None:
    """The Mosquitto program, or None; Debian's is in /usr/sbin, not on a plain user's PATH."""
    path = os.pathsep.join(filter(None, [os.environ.get("PATH"), *SBIN]))
    found = shutil.which("mosquitto", path=path)
    return Path(found) if found else None


def configuration(folder: Path, host: str, port: int, *, passwords: bool, tls: bool = False) -> str:
    """The text of mosquitto.conf.

    Args:
        folder: absolute; holds `acl`, `passwd` and the saved state.
        host: the address to listen on; "" for all.
        port: the port.
        passwords: whether clients must log in as a user of `folder/passwd`.
        tls: whether clients must have a certificate of `folder/ca.pem`, whose common name is then
            their user name, and no password. `folder/crl.pem` lists those that are revoked.
    """
    lines = [
        "# Written by Stillhouse at every start: edits are lost.",
        f"listener {port} {host}".rstrip(),
        f"allow_anonymous {'false' if passwords or tls else 'true'}",
    ]
    if tls:
        lines += [
            f"cafile {folder / 'ca.pem'}",
            f"certfile {folder / 'server.pem'}",
            f"keyfile {folder / 'server.pem'}",
            f"crlfile {folder / 'crl.pem'}",
            "tls_version tlsv1.3",  # every agent speaks it; it hides certificates from the network
            "require_certificate true",
            "use_identity_as_username true",
            f"acl_file {folder / 'acl'}",
        ]
    elif passwords:
        lines += [f"password_file {folder / 'passwd'}", f"acl_file {folder / 'acl'}"]
    if os.geteuid() == 0:  # it would become user `mosquitto`, who cannot write in our folder
        lines += ["user root"]
    lines += [
        "persistence true",
        f"persistence_location {folder}/",
        "persistence_file mosquitto.db",
        f"autosave_interval {AUTOSAVE_S}",
        "persistent_client_expiration 14d",
        f"max_packet_size {MAX_PACKET_BYTES}",
        f"max_inflight_messages {MAX_INFLIGHT}",
        f"max_queued_messages {MAX_QUEUED_MESSAGES}",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        "set_tcp_nodelay true",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
    ]
    return "\n".join(lines) + "\n"
