"""The embedded broker: amqtt 0.12, with its faults mended that would disturb a demonstration.

This module changes the following behaviour of amqtt (a test pins each change):

- it keeps no queue for anonymous clients, and forgets their session a second after they leave;
- a QoS 1 message on its way to a client that disconnects is lost, persistent session or not;
- a client that connects while its old connection still exists (a restarted device) is marked as
  disconnected and gets nothing more, and the new connection's will is published for the old one;
- each client that connects is sent the retained messages of all other clients' subscriptions;
- a message that waited for its client comes with the retain flag, and holds up its subscriptions;
- wills bypass the access list; keep-alive is not enforced, so a frozen client is never noticed;
- every payload is printed into a debug line that is then dropped: 1.1 ms for 128 KiB.

These limits stay, so it is only for demonstrations on one computer: nothing survives its end;
queues and packet sizes have no limit; a PUBACK later than 5 s counts as received; a message of
QoS 0 is forwarded at the QoS of the subscription; MQTT 5 is refused; and anybody who knows a client
id can cut that client off without a password.
"""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from amqtt.broker import Broker, RetainedApplicationMessage
from amqtt.contexts import Action
from amqtt.errors import AMQTTError

from orchestrator.broker import access
from orchestrator.broker.access import matches, may
from orchestrator.broker.watch import replaced
from wire import logs

_WILL = ("will_flag", "will_topic", "will_message", "will_qos", "will_retain")


class _Payload(bytes):
    """A payload whose size alone appears in amqtt's debug lines."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


class _Embedded(Broker):  # type: ignore[misc]  # amqtt has no types
    def __init__(self, host: str, port: int, fleet: str, passwords: dict[str, str] | None) -> None:
        bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        super().__init__({"listeners": {"default": {"type": "tcp", "bind": bind}}, "plugins": {}})
        self._fleet = fleet
        self.passwords = passwords

    async def let_in(self, passwords: dict[str, str]) -> None:
        """Replace the users, and end the connections of those that are no longer there."""
        self.passwords = passwords
        for session, handler in list(self._sessions.values()):
            if session.username not in passwords and not handler.writer.is_closed:
                await handler.handle_connection_closed()

    async def _authenticate(self, session: Any, _listener: Any) -> bool:
        if self.passwords is None:
            return True
        stored = self.passwords.get(session.username or "")
        if stored is None or not matches(session.password or "", stored):
            return False
        will = session.will_topic if session.will_flag else None
        return will is None or may(session.username, will, self._fleet, write=True)

    async def _topic_filtering(self, session: Any, topic: str, action: Any) -> bool:
        if self.passwords is None:
            return True
        return may(session.username or "", topic, self._fleet, write=action == Action.PUBLISH)

    async def _broadcast_message(
        self, session: Any, topic: Any, data: Any, force_qos: int | None = None
    ) -> None:
        await super()._broadcast_message(session, topic, _Payload(data or b""), force_qos)

    async def _initialize_client_session(self, *arguments: Any) -> tuple[Any, Any]:
        handler, session = await super()._initialize_client_session(*arguments)
        handler.will = {name: getattr(session, name) for name in _WILL}
        session.keep_alive += (session.keep_alive + 1) // 2  # MQTT-3.1.2-24: one and a half times
        handler.handle_read_timeout = lambda: asyncio.ensure_future(
            handler.handle_connection_closed()
        )
        publish = handler.mqtt_publish

        async def publish_or_keep(
            topic: str, data: Any, qos: Any, retain: bool, ack_timeout: int | None = None
        ) -> Any:
            try:
                return await publish(topic, data, qos, retain, ack_timeout)
            except (asyncio.CancelledError, AMQTTError, OSError) as error:
                late = isinstance(error, TimeoutError) and not handler.writer.is_closed
                if not qos or session.clean_session or late:
                    raise
                current = self._get_handler(session)
                if current not in (None, handler) and session.transitions.state == "connected":
                    return await current.mqtt_publish(topic, data, qos, retain)
                session.retained_messages.put_nowait(
                    RetainedApplicationMessage(None, topic, data, qos)
                )
                raise

        handler.mqtt_publish = publish_or_keep
        return handler, session

    async def _handle_disconnect(self, session: Any, handler: Any, waiter: Any) -> None:
        for name, value in handler.will.items():  # this connection's will, not its successor's
            setattr(session, name, value)
        await super()._handle_disconnect(session, handler, waiter)
        current = self._get_handler(session)
        if current not in (None, handler) and not current.writer.is_closed:
            session.transitions.connect()

    async def _publish_session_retained_messages(self, session: Any) -> None:
        if session.transitions.state != "connected":  # the old connection ended after the new began
            session.transitions.connect()
        handler = self._get_handler(session)
        while not session.retained_messages.empty():
            m = session.retained_messages.get_nowait()
            sending = handler.mqtt_publish(m.topic, m.data, m.qos, retain=False)
            self._tasks_queue.append(asyncio.ensure_future(sending))

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Any
    ) -> None:
        if any(s is session for s, _ in self._subscriptions.get(subscription[0], ())):
            await super()._publish_retained_messages_for_subscription(subscription, session)


async def serve(host: str, port: int, fleet: str, passwords: Path | None) -> None:
    """Run the broker until cancelled, then end the process.

    Args:
        host: a loopback address.
        port: the port.
        fleet: with passwords, the access rules allow this fleet's topics.
        passwords: a file of user:hash lines (see `access.hashed`), read again when it is replaced;
            None lets anybody in.
    """
    logs.to_stream(level=logging.WARNING)
    known = None if passwords is None else access.passwords(passwords)
    broker = _Embedded(host, port, fleet, known)
    await broker.start()
    try:
        if passwords is None:
            await asyncio.Event().wait()
        else:
            async for _ in replaced(passwords):
                await broker.let_in(access.passwords(passwords))
    finally:
        # Nothing to save. amqtt's shutdown hangs if a packet comes while it cancels a reader: in
        # Python 3.11, asyncio.wait_for drops a cancellation that meets a result.
        os._exit(0)
