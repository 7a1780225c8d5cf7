"""Fuzzers: tests make short runs; `python -m tests.fuzzing.bundles` and `python -m tests.fuzzing.requests` make long ones.

Every case depends only on the seed and its number, so a single case can be run again: `--seed 1 --only 4711`.
"""

import sys
from pathlib import Path

HELPERS = str(Path(__file__).parents[1] / "support")
if HELPERS not in sys.path:  # without pytest
    sys.path.insert(0, HELPERS)
