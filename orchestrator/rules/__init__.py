"""The run's decisions, as pure functions: no network, no disk, no clock."""
