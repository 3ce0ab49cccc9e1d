"""The agent as a service: it starts once the disk has room, and ends when it is told to."""

import gc
import threading

from edge_agent.agent import Agent
from edge_agent.notify import Notifier
from ondevice.config import AgentConfig
from wire import stopping
from wire.stopping import Interrupted
from wire.storage import Patience


def serve(config: AgentConfig) -> None:
    """Run an agent until it is told to stop."""
    systemd, wait = Notifier(), threading.Event().wait
    agent: Agent | None = None

    def stop() -> None:
        if agent is None:
            raise Interrupted  # images may take minutes to read, and no work has begun
        agent.stop()

    def pause(seconds: float) -> bool:
        systemd.alive()
        return wait(seconds)

    def say() -> str:
        return (
            "stopping; an order that is open is kept, and begun again at the next start; go on "
            f"with: {stopping.command()}"
        )

    with stopping.instead(say, stop):
        try:
            # Without room for the journal the agent cannot start, but the service is up and waits.
            agent = Patience(systemd.ready, pause).attempt(lambda: Agent(config))
        except Interrupted:
            return
        gc.freeze()  # these objects stay: later collections skip them
        agent.run()
