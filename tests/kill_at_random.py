"""Run prism-refactor --resume and kill it (SIGKILL) at random moments until a run ends: python tests/kill_at_random.py SEED ARGUMENTS...

Prints how many layers were finished after every kill. Every other kill waits for another layer first, so that the run ends on any machine.
Each run is a fork of this process, which has imported everything already.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import prism_refactor.api  # noqa: F401  (commands import it late; so that forks need not)
from prism_refactor.cli import app as door
from prism_refactor.cli import refactor
from prism_refactor.files import finished_layers

LONGEST, LAYER = 0.4, 0.1

if __name__ == "__main__":
    chance, arguments, finished = random.Random(int(sys.argv[1])), [*sys.argv[2:], "--resume", "--quiet"], []
    out = Path(sys.argv[3])
    while True:
        child = os.fork()
        if child == 0:
            os._exit(door.run(refactor.main.command, arguments))
        before = finished_layers(out)
        if len(finished) % 2:
            while finished_layers(out) == before and not out.exists():
                time.sleep(0.005)
        time.sleep(chance.random() * (LAYER if len(finished) % 2 else LONGEST))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if out.exists():
            break
        assert os.WIFSIGNALED(status), "it ended by itself, without a result"
        finished.append(finished_layers(out))
    print(json.dumps(finished))
