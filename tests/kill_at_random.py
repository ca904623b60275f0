"""Run prism-refactor --resume and kill it (SIGKILL) at random moments until a run ends: python tests/kill_at_random.py SEED ARGUMENTS...

Prints how many layers were finished after every kill. Each run is a fork of this process, which has imported everything already.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from prism_cli import door, refactor

# Seconds to the kill, at most, at first; every try may take a little longer, so that the run ends on any machine.
LONGEST, LONGER, MOST = 0.3, 1.1, 60

if __name__ == "__main__":
    chance, arguments, finished = random.Random(int(sys.argv[1])), [*sys.argv[2:], "--resume", "--quiet"], []
    out = Path(sys.argv[3])
    while len(finished) < MOST:
        child = os.fork()
        if child == 0:
            os._exit(door.run(refactor.main.command, arguments))
        time.sleep(chance.random() * LONGEST * LONGER ** len(finished))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if out.exists():
            break
        assert os.WIFSIGNALED(status), "it ended by itself, without a result"
        finished.append(len(list((out.with_name(f"{out.name}.partial") / ".state").glob("layer-*.json"))))
    print(json.dumps(finished))
