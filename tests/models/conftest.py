"""Networks this small gain nothing from more threads."""

import pytest


@pytest.fixture(autouse=True)
def _quiet(one_thread):
    """Limits every test in this folder to one thread."""
