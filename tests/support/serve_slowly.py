"""`python serve_slowly.py SECONDS serve ...`: the edgelm command with an engine whose steps take SECONDS longer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import served_board

import edgelm.mqtt.service_setup
from edgelm.cli import main

if __name__ == "__main__":
    served_board.SlowEngine.step_s = float(sys.argv[1])
    edgelm.mqtt.service_setup.Engine = served_board.SlowEngine
    sys.exit(main(sys.argv[2:]))
