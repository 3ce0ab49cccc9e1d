"""The agent as a service: it starts where the disk has room, and ends when it is asked to."""

import gc
import threading
from collections.abc import Callable

from edge_agent.agent import Agent
from edge_agent.notify import Notifier
from ondevice.config import AgentConfig
from wire.stopping import Interrupted
from wire.storage import Patience


def serve(config: AgentConfig, install_stop: Callable[[Callable[[], None]], None]) -> None:
    """Run an agent; `install_stop` is given what to call, in this thread, to end it."""
    systemd, wait = Notifier(), threading.Event().wait

    def end() -> None:
        raise Interrupted  # images may take minutes to read, and nothing is begun

    def pause(seconds: float) -> bool:
        systemd.alive()
        return wait(seconds)

    install_stop(end)
    try:
        # Without room for the journal there is no agent, and the service is up all the same.
        agent = Patience(systemd.ready, pause).attempt(lambda: Agent(config))
        install_stop(agent.stop)
    except Interrupted:
        return
    gc.freeze()  # what is here stays: later collections pass it over
    agent.run()
