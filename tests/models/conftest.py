"""Networks this small gain nothing from more threads."""

import pytest


@pytest.fixture(autouse=True)
def _quiet(one_thread):
    """For every test of this folder."""
