"""Submits a signed measurement to the orchestrator; the agent may be running meanwhile.

The report is published, retained, under the device's `telemetry`. So the broker keeps it until an
orchestrator has read it, answers with a receipt, and removes it from the broker. The client id
differs from the agent's, so that the agent stays connected. The agent ignores receipts of reports.
"""

import hashlib
import os
import queue
import time

from ondevice.config import AgentConfig
from wire import messages, topics
from wire.errors import LinkError, SettingsError, WireError
from wire.link import Arrived, Connected, Link, LinkEvent, Lost
from wire.measurement import MAX_BYTES, Measurement
from wire.messages import Measured, Receipt
from wire.sealing import Opener

TICK_S = 0.25


def submit(report: Measurement, chosen: AgentConfig, timeout_s: float) -> None:
    """Send a report to the orchestrator, and wait for the receipt.

    Raises:
        SettingsError: the report is too large for one message, or the orchestrator refuses it.
        LinkError: the broker cannot be reached or refuses this device, or no receipt came.
    """
    body = report.to_bytes()
    if len(body) > MAX_BYTES:
        raise SettingsError(
            f"--submit: the report has {len(body):,} bytes with its {len(report.layers)} rows of "
            f"layers, limit {MAX_BYTES:,}; write it with --json and send the file instead"
        )
    digest = hashlib.sha256(body).hexdigest()
    payload = messages.encode(Measured(chosen.device, digest), body)
    events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
    link = Link(
        chosen.broker,
        f"{chosen.client_id}-measure-{os.getpid()}",
        subscriptions=[(topics.topic(chosen.fleet, chosen.device, "order"), 1)],
        emit=events.put,
    )
    opener = Opener(chosen.kit.signer)
    ends, lost_reason, sent = time.monotonic() + timeout_s, "", False
    link.start()
    try:
        while (remaining := ends - time.monotonic()) > 0:
            try:
                event = events.get(timeout=min(remaining, TICK_S))
            except queue.Empty:
                if link.refused:
                    raise link.refused from None
                continue
            match event:
                case Connected():
                    topic = topics.topic(chosen.fleet, chosen.device, "telemetry")
                    link.publish(topic, payload, retain=True)
                    sent = True
                case Lost(reason):
                    lost_reason = reason
                case Arrived(topic, message) if receipt := _receipt(opener, topic, message, digest):
                    if receipt.accepted:
                        return
                    raise SettingsError(f"the orchestrator refuses the report: {receipt.reason}")
    finally:
        link.close()
    if not sent:
        raise LinkError(
            lost_reason
            or f"broker {chosen.broker.url} does not answer in {timeout_s:g} s; is it running?"
        )
    raise LinkError(
        f"no receipt in {timeout_s:g} s: no orchestrator of fleet {chosen.fleet!r} is at work, or "
        "the broker's access list does not let this device write its telemetry. The broker keeps "
        "the report, and an orchestrator takes it when it next starts; or send --json's file"
    )


def _receipt(opener: Opener, topic: str, payload: bytes, digest: str) -> Receipt | None:
    """The receipt of this report; None for any other message to the device."""
    try:
        message, _ = messages.decode(opener.open(topic, payload), sender="the orchestrator")
    except WireError:  # newer than this agent, and not for this command
        return None
    if isinstance(message, Receipt) and (message.subject, message.run) == ("measured", digest):
        return message
    return None
