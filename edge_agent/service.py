"""The agent as a service: it starts once the disk has room, and ends when it is told to."""

import gc
import threading

from edge_agent.agent import Agent
from edge_agent.joining import join
from edge_agent.notify import Notifier
from ondevice.config import AgentConfig
from wire import stopping
from wire.stopping import Interrupted
from wire.storage import Patience


def serve(config: AgentConfig) -> None:
    """Run an agent until it is told to stop."""
    systemd, wait = Notifier(), threading.Event().wait
    joining, ended = threading.Event(), threading.Event()
    agent: Agent | None = None

    def stop() -> None:
        ended.set()
        if joining.is_set():
            return
        if agent is None:
            raise Interrupted  # images may take minutes to read, and no work has begun
        agent.stop()

    def pause(seconds: float) -> bool:
        systemd.alive()
        return wait(seconds)

    def joined() -> None:
        joining.set()
        try:
            join(config, systemd.ready, lambda: pause(0.0) or ended.is_set())
        finally:
            joining.clear()

    def say() -> str:
        return (
            "stopping; an order that is open is kept, and begun again at the next start; go on "
            f"with: {stopping.command()}"
        )

    with stopping.instead(say, stop):
        try:
            # Without room for the journal the agent cannot start, but the service is up and waits.
            patience = Patience(systemd.ready, pause)
            patience.attempt(joined)
            if ended.is_set():
                return
            agent = patience.attempt(lambda: Agent(config))
        except Interrupted:
            return
        gc.freeze()  # these objects stay: later collections skip them
        agent.run()
