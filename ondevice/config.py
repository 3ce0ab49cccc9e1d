"""The agent's configuration: `agent.toml` as a frozen dataclass, and a template of the file."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from wire import address, records, settings, signing, topics
from wire.address import BrokerAddress
from wire.errors import SettingsError, SignatureError
from wire.settings import Setting, Template

# Below the state folder, where there is a kit; `edge_agent.joining` makes them.
IDENTITY, AUTHORITY, CERTIFICATE = "identity", "authority.pem", "device.pem"
BAD_SHARE = 0.05  # share of a folder's pictures that may be damaged


@dataclass(frozen=True)
class Kit:
    """How a device gets its certificate, where the fleet has an authority; PEM texts.

    Attributes:
        authority: the certificate of the fleet's authority, by which the broker is known.
        claim: a certificate and its key, with which the device asks for its own, once.
        signer: the orchestrator's public key; orders and receipts must be signed by it. "": any.
    """

    authority: str = ""
    claim: str = field(default="", repr=False)
    signer: str = ""

    def __post_init__(self) -> None:
        if bool(self.authority) != bool(self.claim):
            raise ValueError("authority and claim belong together: copy both from the kit")
        if self.signer:
            _check_key("signer", self.signer)


@dataclass(frozen=True)
class AgentConfig:
    """The settings of one device.

    Attributes:
        device: the name under which the device is enrolled.
        fleet: the fleet to which it belongs.
        data: an `.npz` with `x` (N, H, W, C) uint8 and `y`, or a folder with a sub-folder a class.
        state: folder for artifacts, weights, blobs and the journal; survives power cuts.
        broker: the broker's address, and the credentials for it.
        kit: replaces the credentials by a certificate that the device gets itself.
        image: channels, height, width of the model's input; a folder's images are resized to it.
        bad_share: share of the pictures that may be damaged; they are left out. One may always be
            damaged, unless the share is 0. More are an error.
        threads: number for ONNX Runtime and numpy; 0 takes all cores.
        chunk_bytes: size of the chunks in which results are pulled.
        window: how many chunks of a download are requested at once.
        retry_s: after this time, a missing chunk is requested again.
        resend_s: after this time, a result without a receipt is offered again.
        telemetry_s: shortest time between two progress reports.
        max_download_bytes: an artifact file, a state or a teacher above this size is refused.
        release_key: public key that verifies updates of the package; "": no updates are taken.
        updates: folder in which updates are staged; the package's path unit watches it.
        updates_kept: root's folder of updates; it says which updates were refused or failed.
        update_minutes: a new version that does not run after this time is rolled back.
    """

    device: str
    fleet: str
    data: Path
    state: Path
    broker: BrokerAddress
    _: KW_ONLY
    kit: Kit = Kit()
    image: tuple[int, int, int] = (3, 32, 32)
    bad_share: float = BAD_SHARE
    threads: int = 0
    chunk_bytes: int = 128 * 1024
    window: int = 8
    retry_s: float = 10.0
    resend_s: float = 30.0
    telemetry_s: float = 1.0
    max_download_bytes: int = 1 << 30
    release_key: str = ""
    updates: Path = Path("/var/lib/stillhouse/update")
    updates_kept: Path = Path("/var/cache/stillhouse")
    update_minutes: float = 5.0

    @property
    def client_id(self) -> str:
        """The agent's name at the broker; only holders of its credentials can know it."""
        tag = address.tag(self.kit.claim) if self.kit.claim else self.broker.tag
        return address.client_id(self.fleet, self.device, tag)

    def __post_init__(self) -> None:
        topics.check_name(self.device, "device name")
        topics.check_name(self.fleet, "fleet name")
        for name, fits, expected in (
            ("image", min(self.image) >= 1, "[channels, height, width]"),
            ("bad_share", 0 <= self.bad_share <= 1, "a share from 0 to 1"),
            ("chunk_bytes", 1024 <= self.chunk_bytes <= 1 << 19, f"1024 to {1 << 19}"),
            ("threads", self.threads >= 0, "0 (all cores) or more"),
            ("window", self.window >= 1, "1 or more"),
            ("retry_s", self.retry_s > 0, "over 0"),
            ("resend_s", self.resend_s > 0, "over 0"),
            ("telemetry_s", self.telemetry_s > 0, "over 0"),
            ("update_minutes", 0 < self.update_minutes <= 24 * 60, "over 0 to a day"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")
        if self.kit.claim and not self.broker.secure:
            raise ValueError(
                f"kit: is for TLS, and broker.url is {self.broker.url}; write mqtts://"
            )
        if self.release_key:
            _check_key("release_key", self.release_key)


def _check_key(name: str, key: str) -> None:
    try:
        signing.check_public(key)
    except SignatureError as fault:
        raise ValueError(f"{name}: {fault}") from fault


ABOUT = (
    "Configuration of one Stillhouse edge agent. Start it with: edge-agent run --config agent.toml"
)
TEMPLATE = Template(
    AgentConfig,
    (ABOUT,),
    {
        "device": Setting("device-0", "the name it is enrolled under (orchestrator enroll)"),
        "fleet": Setting("fleet", "the fleet it belongs to"),
        "data": Setting(
            "images", "an .npz with x (N, H, W, C) uint8 and y, or a folder, a sub-folder a class"
        ),
        "state": Setting("state", "artifacts, weights and the journal; survives power cuts"),
        "image": Setting(
            AgentConfig.image, "channels, height, width; a folder's images are brought to it"
        ),
        "bad_share": Setting(
            AgentConfig.bad_share,
            "damaged pictures are left out; more than this share are an error",
        ),
        "threads": Setting(AgentConfig.threads, "of ONNX Runtime and numpy; 0 takes all cores"),
        "chunk_bytes": Setting(
            AgentConfig.chunk_bytes,
            "of the pieces that results travel in; less where the broker takes less",
        ),
        "release_key": Setting(
            AgentConfig.release_key, 'updates of the package are signed by it; "" takes none'
        ),
        "update_minutes": Setting(
            AgentConfig.update_minutes, "that an update has until it runs, or it is rolled back"
        ),
        "broker.url": Setting(
            "mqtt://localhost:1883",
            "mqtts:// with ca_file, and cert_file and key_file for mutual TLS",
        ),
        "broker.username": Setting("", "with a password where the broker asks for one"),
        "broker.password": Setting(""),
    },
)


def template(changes: Mapping[str, Any] | None = None) -> str:
    """A commented `agent.toml`.

    Args:
        changes: values that replace the template's, by dotted key.

    Raises:
        SettingsError: the file could not be loaded; the message says what was expected.
    """
    return settings.render(TEMPLATE, changes or {})


def load(path: Path) -> AgentConfig:
    """Read `agent.toml`; its relative paths start from the folder of the file.

    With a kit, the broker's address names files that are there once the device has joined.

    Raises:
        SettingsError: the file cannot be read or a setting is wrong; the message names the file,
            the key and what was expected.
    """
    config = records.load(AgentConfig, path)
    folder = path.resolve().parent
    names = ("data", "state", "updates", "updates_kept")
    try:
        broker = config.broker.beside(folder)
    except ValueError as fault:
        raise SettingsError(f"{path}: broker: {fault}") from fault
    found = {name: folder / getattr(config, name) for name in names}
    if config.kit.claim:
        if broker.ca_file or broker.cert_file:
            raise SettingsError(
                f"{path}: kit: replaces broker.ca_file, cert_file and key_file; take those out"
            )
        own = found["state"] / IDENTITY
        broker = replace(broker, ca_file=own / AUTHORITY, cert_file=own / CERTIFICATE)
    return replace(config, broker=broker, **found)
