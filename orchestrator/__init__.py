"""The server: forms cohorts, runs rounds, distils, aggregates, and keeps what it has learnt."""

__version__ = "0.1.0"
