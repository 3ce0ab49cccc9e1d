"""How a device tells the fleet that it is there: births, deaths, and the number of each session.

A birth and a death bear the number of the session that they are of, so that the will of an earlier
connection, which the broker may publish late, does not end a later one.
"""

import itertools

from edge_agent.folder import Folder
from edge_agent.update.staging import Updates
from ondevice import meter
from ondevice.images import ImageSet
from wire import __version__, classes
from wire.messages import Birth, Death


class Presence:
    """What one device says of itself.

    Args:
        device: its name.
        folder: its state folder, which counts sessions.
        images: what it trains on.
        updates: the package that it runs.
    """

    def __init__(self, device: str, folder: Folder, images: ImageSet, updates: Updates) -> None:
        self._device, self._folder = device, folder
        self._images, self._updates = images, updates
        self._platform = meter.this_platform()
        self._sessions = itertools.count(folder.first_session)
        self._session = folder.first_session

    def begin_session(self) -> Death:
        """A new session's will; called by the network thread before each attempt to connect."""
        self._session = next(self._sessions)
        return self.death()

    def birth(self) -> Birth:
        """The device is there, in this session."""
        names, digest = classes.told(self._images.names)
        return Birth(
            device=self._device,
            session=self._session,
            version=__version__,
            samples=len(self._images.y),
            data_digest=self._images.digest,
            platform=self._platform,
            package=self._updates.own,
            update=self._updates.word,
            classes=names,
            classes_digest=digest,
            state_id=self._folder.state_id,
        )

    def death(self) -> Death:
        """This session is over."""
        return Death(self._device, self._session, self._folder.state_id)
