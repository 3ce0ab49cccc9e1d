"""The server: forms cohorts, runs rounds, distils, aggregates, and keeps what it has learnt."""

import os
import sys
from os.path import dirname, realpath  # `pathlib` takes milliseconds to import

# Import our own `models`, `tools` and `wire`, which lie beside this package, and not a user's
# packages of these names, in the current folder or installed.
sys.path.insert(0, dirname(dirname(realpath(__file__))))  # noqa: PTH120

# PyTorch asks for huge pages, if Linux gives them: server training of `fastcnn6-64` in batches of
# 1,000 was 1.17 times as fast on two x86 cores, since each step allocates its maps anew. PyTorch
# reads this when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from wire import early

early.listen("orchestrator", "orchestrator")

from wire import extras  # noqa: E402 - Ctrl-C comes first

extras.check("orchestrator")
