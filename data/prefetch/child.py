"""A process that reads and decodes some lanes ahead: `python -m <this module> FD`.

Started by process_lanes.py. Reads its job (a pickled `LaneJob`) from standard input and writes
samples to file descriptor FD. When standard input closes, it exits.
"""

import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from threading import Event, Thread

from data.open_lanes import LaneJob


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    stdin = sys.stdin.buffer
    job: LaneJob = pickle.loads(stdin.read(int.from_bytes(stdin.read(8), "little")))
    Thread(target=_exit_with_parent, daemon=True).start()
    pipe = Connection(int(sys.argv[1]), readable=False)
    try:
        lanes = job.open(Event())
        while True:
            pipe.send(lanes.next())
    except BrokenPipeError:
        return
    except Exception as error:  # the parent raises it where the samples are wanted
        pipe.send(error)


def _exit_with_parent() -> None:
    while sys.stdin.buffer.read(1 << 16):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
