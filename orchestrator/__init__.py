"""The server: forms cohorts, runs rounds, distils, aggregates, and keeps what it has learnt."""

import sys
from pathlib import Path

# Import our own `models`, `tools` and `wire`, which lie beside this package, and not a user's
# packages of these names, in the current folder or installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wire import extras, stopping

stopping.early("orchestrator", "orchestrator")
extras.check("orchestrator")
