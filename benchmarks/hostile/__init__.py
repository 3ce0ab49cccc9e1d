"""What hostile devices cost, by the rule of averaging; see `__main__`."""

import orchestrator  # noqa: F401 - before torch, for which it asks for huge pages
