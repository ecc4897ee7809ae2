"""Start the ranks of a cluster of CPUs for a test: msrun, a free port, and what every process said when one fails."""
import os
import random
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
FINISHED = "this rank has finished"
PORTS = range(10000, 32768)  # below those that Linux gives to whoever asks for any: such a one may be taken before msrun binds it


def free_port():
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                continue  # somebody listens
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue  # somebody else's
        return str(port)


def environment(**more):
    """The environment of a child: this Python first in the path, because msrun starts "python", and the sources tested here."""
    return os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
                         "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))} | more


def msrun(size, logs, *command):
    """The arguments of msrun for so many ranks on this node."""
    found = shutil.which("msrun", path=environment()["PATH"])
    return [found, f"--worker_num={size}", f"--local_worker_num={size}", f"--master_port={free_port()}", f"--log_dir={logs}",
            "--join=True", *map(str, command)]


def start():
    """The first call of a rank's script: join the others. A rank waits for one that compiles for longer; the scheduler, which
    is never told of a rank that crashes, does not."""
    import mindspore as ms
    from mindspore.communication import init

    if os.environ["MS_ROLE"] == "MS_WORKER":
        os.environ["MS_NODE_TIMEOUT"] = "600"
    ms.set_device("CPU")
    init("mccl")


def finish():
    """The last call of a rank's script: all ranks have written what they found, and say so."""
    import numpy as np
    from mindspore import Tensor, ops

    ops.AllReduce()(Tensor(np.zeros(1, np.float32))).asnumpy()
    print(FINISHED, flush=True)


def run_ranks(folder, size, script, *arguments, timeout=900):
    """Run a script of this folder as all ranks of a cluster, from its ``start`` to its ``finish``.

    Once in hundreds of starts MindSpore's receiving thread reads what its process has freed as it ends, a segmentation fault
    after the last line of the script: that is a warning.
    """
    done = subprocess.run(msrun(size, folder / "log", HERE / script, *arguments), cwd=folder, timeout=timeout, text=True,
                          env=environment(MS_TOPO_TIMEOUT="600"), capture_output=True)
    said = {log.stem: log.read_text(errors="replace") for log in sorted((folder / "log").glob("*.log"))}
    ended = [rank for rank in range(size) if FINISHED in said.get(f"worker_{rank}", "")]
    text = "\n".join(f"== {name}\n{text[-3000:]}" for name, text in (said | {"msrun": done.stdout + done.stderr}).items())
    assert len(ended) == size, f"ranks {ended} of {size} have finished\n{text}"
    if done.returncode:
        warnings.warn(f"msrun: {done.returncode}, after all ranks have finished\n{text}", stacklevel=2)
