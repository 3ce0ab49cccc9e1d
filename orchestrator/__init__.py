"""The server: forms cohorts, runs rounds, distils, aggregates, and keeps what it has learnt."""

from wire import stopping

stopping.early("orchestrator", "orchestrator")

__version__ = "0.1.0"
