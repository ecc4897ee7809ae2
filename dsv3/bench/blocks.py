"""A worker that makes blocks of training steps when told to: what both sides of ``peer`` share.

Only the standard library: the other side may be an interpreter that has neither this package nor MindSpore.
Requests are lines, the number of steps; answers are lines of JSON. Between two requests the worker is blocked
in a read.
"""

import json
import os
import resource
import sys
import time


def confine(cpus):
    """Restrict this process to its first ``cpus`` CPUs: before imports, which size thread pools by it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])


def take_stdout():
    """The real standard output as a file of lines; what libraries print there now goes to standard error."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def serve(out, facts, step):
    """Say ``facts``, then answer each request for k steps until the input ends.

    step() -> loss makes one step. An answer: "seconds" of each step, "losses", "cpu" seconds of the block,
    "idle_cpu" seconds since the last one, "peak_bytes".
    """
    print(json.dumps(facts), file=out)
    ended = time.process_time()
    for line in sys.stdin:
        began = time.process_time()
        seconds, losses = [], []
        for _ in range(int(line)):
            start = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - start)
        idle, ended = began - ended, time.process_time()
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "losses": losses,
                    "cpu": ended - began,
                    "idle_cpu": idle,
                    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                }
            ),
            file=out,
        )
