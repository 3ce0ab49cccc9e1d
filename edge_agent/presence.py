"""A device's presence in the fleet: births, deaths, and the number of each session.

Births and deaths carry the number of their session. The broker may publish the will of an earlier
connection late; its number keeps it from ending a later session.
"""

import itertools

from edge_agent.folder import Folder
from edge_agent.update.staging import Updates
from ondevice import meter
from ondevice.images import ImageSet
from wire import __version__, classes
from wire.messages import Birth, Death


class Presence:
    """Makes the births and deaths of one device.

    Args:
        device: the device's name.
        folder: its state folder, which counts sessions.
        images: the images on which it trains.
        updates: the package that it runs, and the state of its update.
    """

    def __init__(self, device: str, folder: Folder, images: ImageSet, updates: Updates) -> None:
        self._device, self._folder = device, folder
        self._images, self._updates = images, updates
        self._platform = meter.this_platform()
        self._sessions = itertools.count(folder.first_session)
        self._session = folder.first_session

    def begin_session(self) -> Death:
        """Begin a session and return its will; called by the network thread before it connects."""
        self._session = next(self._sessions)
        return self.death()

    def birth(self) -> Birth:
        """The message that the device is there, in this session."""
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
        """The message that this session is over."""
        return Death(self._device, self._session, self._folder.state_id)
