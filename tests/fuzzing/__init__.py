"""Fuzzers: a short run is a test, a long one is `python -m tests.fuzzing.bundles` or `python -m tests.fuzzing.requests`.

Every case is made from the seed and its number alone, so that one can be run again: `--seed 1 --only 4711`.
"""

import sys
from pathlib import Path

HELPERS = str(Path(__file__).parents[1] / "support")
if HELPERS not in sys.path:  # where pytest has not put it there
    sys.path.insert(0, HELPERS)
