"""Who may do what on our brokers: passwords and access rules, for both kinds of broker.

A device's user name is its device name. The device writes `birth`, `death`, `result`, `telemetry`
and `up` under its own name, reads `order` and `down` there, and reads everything under `all`. The
user `orchestrator` reads and writes all topics of the fleet.
"""

import hashlib
import hmac
import secrets
from base64 import b64decode, b64encode
from pathlib import Path

from wire import topics

ORCHESTRATOR = "orchestrator"
_ROUNDS = 10_000  # takes a few milliseconds; Mosquitto hashes in its only thread, so not more
_SALT_BYTES = 12  # Mosquitto 2.0 accepts no other length


def hashed(password: str) -> str:
    """A password as `mosquitto_passwd` stores it: $7$rounds$salt$PBKDF2-HMAC-SHA512."""
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ROUNDS)
    return f"$7${_ROUNDS}${b64encode(salt).decode()}${b64encode(digest).decode()}"


def matches(password: str, stored: str) -> bool:
    """Whether `hashed` made `stored` from this password."""
    _, _, rounds, salt, digest = stored.split("$")
    given = hashlib.pbkdf2_hmac("sha512", password.encode(), b64decode(salt), int(rounds))
    return hmac.compare_digest(given, b64decode(digest))


def passwords(path: Path) -> dict[str, str]:
    """Each user's hashed password (see `hashed`), by user name, from a file of user:hash lines."""
    lines = path.read_text("utf-8").splitlines()
    return {user: stored for user, _, stored in (line.partition(":") for line in lines)}


def access_list(fleet: str) -> str:
    """The access rules as a Mosquitto `acl_file`; %u stands for the user name."""
    writes = [f"pattern write {topics.topic(fleet, '%u', c)}" for c in topics.FROM_DEVICE]
    reads = [f"pattern read {topics.topic(fleet, '%u', c)}" for c in topics.TO_DEVICE]
    everybody = f"pattern read {topics.topic(fleet, topics.ALL, '+')}"
    all_of_it = f"user {ORCHESTRATOR}\ntopic readwrite {topics.ROOT}/{fleet}/#"
    return "\n".join([all_of_it, "", *writes, *reads, everybody, ""])


def may(user: str, topic: str, fleet: str, *, write: bool) -> bool:
    """Whether the access rules allow a user one topic, or the filter of a subscription."""
    own, shared = topics.topic(fleet, user, ""), topics.topic(fleet, topics.ALL, "")
    if user == ORCHESTRATOR:
        return topic.startswith(f"{topics.ROOT}/{fleet}/")
    if topic.startswith(own):
        return topic.removeprefix(own) in (topics.FROM_DEVICE if write else topics.TO_DEVICE)
    channel = topic.removeprefix(shared)
    return not write and channel != topic and "/" not in channel and channel != "#"
