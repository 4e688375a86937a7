"""A process that reads and decodes some lanes ahead: `python -m data.process FD`, started by process_lanes.py.

Its job comes on standard input, which then stays open for as long as anybody wants the samples; they go to FD.
"""

import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from threading import Event, Thread

from data.lane_set import open_lanes
from data.steps import OwnLanes


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever started it decides when it ends
        signal.signal(number, signal.SIG_IGN)
    stdin = sys.stdin.buffer
    config, seed, share, total, step, states = pickle.loads(stdin.read(int.from_bytes(stdin.read(8), "little")))
    Thread(target=_leave_with_parent, daemon=True).start()
    pipe = Connection(int(sys.argv[1]), readable=False)
    try:
        lanes = open_lanes(config, seed=seed, states=states, total=total, closing=Event())
        source = OwnLanes(lanes, share, total=total, step=step)
        while True:
            pipe.send(source.next())
    except BrokenPipeError:
        return
    except Exception as error:  # it is raised where the samples are wanted
        pipe.send(error)


def _leave_with_parent() -> None:
    while sys.stdin.buffer.read(1 << 16):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
