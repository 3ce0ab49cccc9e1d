"""The server: forms cohorts, runs rounds, distils, aggregates, and keeps what it has learnt."""

import sys
from pathlib import Path

# `models`, `tools` and `wire` are ours: a user's packages of these names, in the current folder or
# installed, are others. Ours lie side by side, and are looked for there first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wire import extras, stopping

stopping.early("orchestrator", "orchestrator")
extras.check("orchestrator")

__version__ = "0.1.0"
