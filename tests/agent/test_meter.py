"""Memory that work has freed goes back to the system."""

import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = """
import threading
import numpy as np
from edge_agent import meter

def work():
    kept = [np.ones(2000) for _ in range(4000)]  # 64 MB, too small each for a mapping of its own
    cycle = [kept]
    cycle.append(cycle)

thread = threading.Thread(target=work)
before = meter.resident_bytes()
thread.start()
thread.join()
after = meter.resident_bytes()
meter.give_back()
print(after - before, meter.resident_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they do")
def test_what_a_thread_of_work_has_freed_is_given_back():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept, left = map(int, done.stdout.split())
    assert kept > 50e6
    assert left < 10e6
