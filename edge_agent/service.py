"""The agent as a service: it starts once the disk has room, and ends when it is told to."""

import gc
import threading
from collections.abc import Callable

from edge_agent.agent import Agent
from edge_agent.notify import Notifier
from ondevice.config import AgentConfig
from wire.stopping import Interrupted
from wire.storage import Patience


def serve(config: AgentConfig, install_stop: Callable[[Callable[[], None]], None]) -> None:
    """Run an agent; pass `install_stop` the function that ends it, to be called in this thread."""
    systemd, wait = Notifier(), threading.Event().wait

    def end() -> None:
        raise Interrupted  # images may take minutes to read, and no work has begun

    def pause(seconds: float) -> bool:
        systemd.alive()
        return wait(seconds)

    install_stop(end)
    try:
        # Without room for the journal the agent cannot start, but the service is up and waits.
        agent = Patience(systemd.ready, pause).attempt(lambda: Agent(config))
        install_stop(agent.stop)
    except Interrupted:
        return
    gc.freeze()  # these objects stay: later collections skip them
    agent.run()
