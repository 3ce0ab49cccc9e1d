"""The server: forms cohorts, runs rounds, distils, aggregates, and keeps what it has learnt."""

import sys
from os.path import dirname, realpath  # `pathlib` takes milliseconds to import

# Import our own `models`, `tools` and `wire`, which lie beside this package, and not a user's
# packages of these names, in the current folder or installed.
sys.path.insert(0, dirname(dirname(realpath(__file__))))  # noqa: PTH120

from wire import early

early.listen("orchestrator", "orchestrator")

from wire import extras  # noqa: E402 - Ctrl-C comes first

extras.check("orchestrator")
