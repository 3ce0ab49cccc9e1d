"""The fleet's authority at work: for our broker, and in a run."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from orchestrator import broker
from orchestrator.broker import access
from orchestrator.config import RunConfig
from orchestrator.fleet import authority, enrolment
from orchestrator.fleet.authority import Authority
from wire import signing, topics
from wire.address import BrokerAddress
from wire.errors import AdmissionError, RunError, StalledError, StillhouseError
from wire.messages import Certificate, Renew, Sign
from wire.sealing import Sealer

log = logging.getLogger("orchestrator")

LOOK_S = 30.0  # from one look for certificates that end soon to the next
AGAIN_S = 3600.0  # from one call for a renewal to the next
_ORCHESTRATOR_DAYS = 365.0

Tell = Callable[[str, Certificate | Renew], None]  # sends a user a message on its `order` topic


def for_broker(runs: Path, fleet: str, host: str) -> broker.Certificates:
    """All that our broker needs for mutual TLS.

    Args:
        runs: folder of all runs.
        fleet: its name.
        host: that the broker listens on; "" if it is every address of this machine.

    Raises:
        RunError: the authority's folder is damaged.
    """
    ours = Authority(runs, fleet)
    if host:
        ours.add_host(host)  # also for a certificate that `kit` makes while the broker runs
    return broker.Certificates(
        ca=ours.certificate.encode(),
        server=ours.server().encode(),
        orchestrator=ours.client(access.ORCHESTRATOR, _ORCHESTRATOR_DAYS).encode(),
        crl=ours.revoked(),
    )


def address(folder: Path, url: str) -> BrokerAddress:
    """The orchestrator's address of our broker, whose files are in a folder."""
    return BrokerAddress(url, ca_file=folder / "ca.pem", cert_file=folder / "orchestrator.pem")


def kit(runs: Path, fleet: str, device: str, host: str, days: float) -> dict[str, str]:
    """A kit's keys of `[kit]`; the broker's certificate holds for the host from now on."""
    ours = Authority(runs, fleet)
    if ours.add_host(host):
        folder = enrolment.broker_folder(runs, fleet)
        broker.certify(folder, server=ours.server().encode())
    former = ours.held().get(device)
    claim = ours.claim(device, days)
    if former:
        _publish(ours, runs, fleet)
    signer = signing.public(ours.signer())
    return {"kit.authority": ours.certificate, "kit.claim": claim, "kit.signer": signer}


def revoke(runs: Path, fleet: str, device: str) -> None:
    """End a device's certificates, if there is an authority; our broker takes them no more."""
    if authority.folder(runs, fleet).exists():
        ours = Authority(runs, fleet)
        ours.revoke(device)
        _publish(ours, runs, fleet)


def renew(runs: Path, fleet: str, device: str) -> None:
    """Let a device renew its certificate.

    Raises:
        RunError: it has none.
    """
    if not authority.folder(runs, fleet).exists():
        raise RunError(
            f"fleet {fleet!r} has no certificates: its devices log in by password, or by "
            "certificates of your own"
        )
    Authority(runs, fleet).renew(device)


def _publish(ours: Authority, runs: Path, fleet: str) -> None:
    """Let our broker begin anew with the list of revoked certificates."""
    broker.certify(enrolment.broker_folder(runs, fleet), crl=ours.revoked())


class Certifier:
    """Gives devices their certificates while a run goes on.

    Args:
        config: of the run.
        tell: sends a message.

    Attributes:
        sealer: signs orders and receipts.

    Raises:
        RunError: the authority's folder is damaged.
    """

    def __init__(self, config: RunConfig, tell: Tell) -> None:
        self._runs, self._fleet = config.runs, config.fleet
        self._authority, self._tell = Authority(config.runs, config.fleet), tell
        self.sealer = Sealer(self._authority.signer(), self._authority.sealed)
        self._days = config.broker.certificate_days
        self._looked_s = -math.inf
        self._called_s: dict[str, float] = {}

    def asked(self, user: str, message: Sign) -> None:
        """Answer a request for a certificate."""
        digest, device = hashlib.sha256(message.request).hexdigest(), topics.joined(user)
        try:
            before = self._authority.held().get(device)
            pem = self._authority.sign(user, message.request, message.proof, self._days)
            if before and before.serials and user != device:
                _publish(self._authority, self._runs, self._fleet)  # those by an earlier kit
        except AdmissionError as fault:
            log.warning("%s gets no certificate: %s", user, fault)
            self._tell(user, Certificate(digest, reason=str(fault)))
        except StalledError:
            raise
        except (StillhouseError, OSError, ValueError) as fault:  # ours; the device asks again
            log.error("%s gets no certificate yet: %s", user, fault)  # noqa: TRY400
        else:
            if before is None or before.certificate != pem:
                log.info("%s: new certificate, for %g days", device, self._days)
            self._called_s.pop(device, None)
            self._tell(user, Certificate(digest, pem))

    def ticked(self, now_s: float, devices: Iterable[str]) -> None:
        """Call devices whose certificate ends soon."""
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        held, clock = self._held(), time.time()
        for device in devices:
            if device not in held or not authority.due(held[device], clock, self._days):
                continue
            if now_s - self._called_s.get(device, -math.inf) >= AGAIN_S:
                self._called_s[device] = now_s
                self._tell(device, Renew())

    def _held(self) -> Mapping[str, authority.Held]:
        """What each device holds; nothing, with a warning, if that cannot be read."""
        try:
            return self._authority.held()
        except (RunError, OSError) as fault:
            log.warning("certificates: %s", fault)
            return {}
