"""Launch: the watch over the ranks, mistakes refused in one line, and real processes that train, lose one, and go on elsewhere.

Planted faults this file was seen to catch: connections that end are not noticed by rank 0; the end of rank 0 not noticed; the
options --dispatch, --node and --noop-layers read and not handed on, or the pipeline checked when the ranks have met.
"""
import contextlib
import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster
import pytest
from test_train_cli import write_home

from dsv3 import train
from dsv3.cli.main import main
from dsv3.parallel import launch, watch
from dsv3.parallel.memory import dispatch
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.shard import Placement
from dsv3.parallel.stages import chunks
from dsv3.parallel.traffic import traffic

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


# -- the watch ---------------------------------------------------------------------------------------------------------
def watched(size, stalled=60.0):
    """(watches of all ranks, a queue of what each hears of a loss)."""
    heard, server = queue.Queue(), watch.listen()
    address = ("127.0.0.1", server.getsockname()[1])
    first = watch.serve(server, size, stalled, lost=lambda text: heard.put((0, text)))
    others = [watch.join(rank, address, lost=lambda text, rank=rank: heard.put((rank, text))) for rank in range(1, size)]
    return [first, *others], heard


def die_in(address, rank):
    """A process that joins as a rank and is killed."""
    code = (f"import time; from dsv3.parallel import watch; w = watch.join({rank}, {address!r}); w.at('step 7'); "
            f"print(1, flush=True); time.sleep(99)")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    child.stdout.readline()
    child.kill()
    child.wait()


def test_a_rank_that_is_killed_is_named_to_all_others_at_once():
    heard, server = queue.Queue(), watch.listen()
    address = ("127.0.0.1", server.getsockname()[1])
    first = watch.serve(server, 4, 60.0, lost=lambda text: heard.put((0, text)))
    others = [watch.join(rank, address, lost=lambda text, rank=rank: heard.put((rank, text))) for rank in (1, 2)]
    for one in (first, *others):
        one.at("step 8")
    die_in(address, 3)
    began, found = time.monotonic(), dict(heard.get(timeout=30) for _ in range(3))
    assert found.keys() == {0, 1, 2} and time.monotonic() - began < 10
    for rank, text in found.items():
        assert text.startswith(f"rank {rank}: rank 3 has ended") and "rank 3: step 7; ranks 0, 1, 2: step 8" in text


def test_the_end_of_rank_0_is_noticed_and_a_normal_end_is_not():
    (first, second, third), heard = watched(3)
    second.at("step 1")
    second.close()
    third.close()
    first.close()
    with pytest.raises(queue.Empty):
        heard.get(timeout=1.5)
    server = watch.listen()
    joined = watch.join(1, ("127.0.0.1", server.getsockname()[1]), lost=lambda text: heard.put((1, text)))
    server.setblocking(True)
    connection, _ = server.accept()
    connection.close()
    assert "rank 0 has ended" in heard.get(timeout=10)[1]
    joined.at("step 2")  # must not raise
    server.close()


def test_a_run_that_stands_still_is_ended_and_says_who_is_behind():
    (first, second, third), heard = watched(3, stalled=2.0)
    for one in (first, third):
        one.at("step 5")
    second.at("waiting for data")
    found = dict(heard.get(timeout=30) for _ in range(3))
    assert found.keys() == {0, 1, 2} and all("rank 1: waiting for data; ranks 0, 2: step 5" in text for text in found.values())


# -- real processes ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A config, a text, and a run on one device that nothing disturbs."""
    folder = tmp_path_factory.mktemp("runs")
    write_home(folder)
    arguments = command("whole", "--eval-every", "1")
    done = subprocess.run(arguments, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def command(out, *more):
    return ["python", "-m", "dsv3", "train", "--config", "config.json", "--data", "text.txt", "--tokenizer", "byte", "--out", out,
            "--steps", str(STEPS), "--batch-size", "4", "--seq-length", "16", "--warmup", "2", "--save-every", "1",
            "--eval-every", str(STEPS), "--eval-batches", "1", "--prompt", "", "--quiet", *more]


def environment(folder, **more):
    return cluster.environment(XDG_CACHE_HOME=str(folder / "cache"), **more)


def ranks(folder, arguments, count, started, **more):
    """(scheduler, workers): what msrun does, but without its killing of the other ranks when one ends."""
    shared = dict(MS_WORKER_NUM=str(count), MS_SCHED_HOST="127.0.0.1", MS_SCHED_PORT=cluster.free_port(), **more)
    roles = [dict(MS_ROLE="MS_SCHED"), *(dict(MS_ROLE="MS_WORKER", MS_NODE_ID=str(i), DEVICE_ID=str(i)) for i in range(started))]
    processes = []
    for i, role in enumerate(roles):
        with open(folder / f"{'scheduler' if i == 0 else f'rank_{i - 1}'}.log", "w") as log:
            processes.append(subprocess.Popen(arguments, cwd=folder, env=environment(folder, **shared, **role), stdout=log,
                                              stderr=subprocess.STDOUT))
    return processes[0], processes[1:]


def wait_for(condition, seconds, processes=()):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and all(p.poll() is None for p in processes):
        time.sleep(0.05)
    return condition()


def log_of(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_under_another_mesh(home):
    out = home / "broken"
    scheduler, workers = ranks(home, command("broken", "--mesh", "data=2"), 2, 2)
    try:
        assert wait_for(lambda: len(log_of(out)) >= 2, 300, workers), (home / "rank_0.log").read_text()[-3000:]
        workers[1].kill()
        assert workers[0].wait(timeout=60) == watch.LOST
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()
    text = (home / "rank_0.log").read_text()
    assert "rank 0: rank 1 has ended" in text and "step" in text.split("rank 1 has ended")[1], text[-2000:]

    arguments = command("broken", "--mesh", "pipe=2", "--accumulate", "2", "--eval-every", "1")
    # every rank tells its process; one of them is told to stop
    process = subprocess.Popen(cluster.msrun(2, home / "logs", *arguments), cwd=home, env=environment(home),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = len(log_of(out))
    second = home / "logs" / "worker_1.log"
    assert wait_for(lambda: second.exists() and "(process " in second.read_text(), 300, [process])
    assert wait_for(lambda: "rank 1: step" in second.read_text(), 300, [process])
    os.kill(int(second.read_text().split("(process ")[1].split()[0]), signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    for rank in range(2):
        text = (home / "logs" / f"worker_{rank}.log").read_text()
        assert "resuming" in text and "mesh pipe=2" in text and "eval_main_loss" in text and "stopped by SIGTERM" in text
    saved = sorted((out / "checkpoints").iterdir())[-1]
    assert 0 < int(saved.name[5:]) < STEPS and int(saved.name[5:]) == max(r["step"] for r in log_of(out)) > 0 and done

    last = subprocess.run(command("broken"), cwd=home, env=environment(home), capture_output=True, text=True, timeout=600)
    assert last.returncode == 0, last.stderr[-3000:]
    ours, whole = ({("loss" in r, r["step"]): r for r in log_of(run)} for run in (out, home / "whole"))
    assert len(whole) == 2 * STEPS and whole.keys() >= ours.keys() >= {(True, 1 + i) for i in range(STEPS)} | {(False, STEPS)}
    assert (False, int(saved.name[5:])) in ours, "the evaluation of the last step on pipe=2"
    for key, record in ours.items():
        assert record.keys() == whole[key].keys()
        for name in record.keys() - {"seconds"}:
            assert record[name] == pytest.approx(whole[key][name], rel=3e-6, abs=1e-9), (key, name)


def test_a_rank_that_never_comes_ends_in_a_message(home):
    scheduler, workers = ranks(home, command("alone", "--mesh", "data=2"), 2, 1, MS_TOPO_TIMEOUT="3")
    try:
        assert workers[0].wait(timeout=200) == 1
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()
    lines = [line for line in (home / "rank_0.log").read_text().splitlines() if line.startswith("dsv3 train: ")]
    assert len(lines) == 1 and "the 2 ranks did not come together" in lines[0] and "--cluster_time_out (3 s)" in lines[0]


# -- mistakes ----------------------------------------------------------------------------------------------------------
def test_processes_that_do_not_make_the_mesh_are_refused(monkeypatch):
    for name in ("MS_ROLE", "RANK_TABLE_FILE", "MS_WORKER_NUM", "RANK_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["dsv3", "train", "--mesh", "data=2,model=4"])
    mesh = Mesh(data=2, model=4)
    with pytest.raises(ValueError, match="has 8 ranks, and this is a single process") as caught:
        launch.check_environment(mesh)
    assert "msrun --worker_num=8 --local_worker_num=8" in str(caught.value)
    assert "python -m dsv3 train --mesh data=2,model=4" in str(caught.value)
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    with pytest.raises(ValueError, match="has 8 ranks, and 4 processes were started"):
        launch.check_environment(mesh)
    monkeypatch.setenv("MS_WORKER_NUM", "8")
    launch.check_environment(mesh)


# -- options -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """``told(*options)``: (cfg, rank 0's place) as ``dsv3 train`` hands them to the makers of both compiled steps, or the line in
    which it refuses the options; ``told.met``: empty when that was before the ranks met."""
    class Told(Exception):
        pass

    def training(cfg, optimizer, *, mesh, rules, pipeline, accumulate, **more):
        met.append((cfg, Placement(mesh, rules, 0, pipeline), accumulate))

    def evaluation(cfg, *, mesh, rules, pipeline, accumulate, **more):
        assert met == ["the ranks", (cfg, Placement(mesh, rules, 0, pipeline), accumulate)]
        raise Told

    met, config = [], tmp_path / "config.json"
    write_home(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "start", lambda mesh, **more: met.append("the ranks") or launch.ALONE)
    monkeypatch.setattr(train, "make_train_step", training)
    monkeypatch.setattr(train, "make_eval_step", evaluation)

    def run(*options):
        met.clear()
        with contextlib.suppress(Told, SystemExit):
            assert main(command("out", "--batch-size", "8", *options)[3:]) == 1
        return met[1][:2] if met[1:] else capsys.readouterr().err.splitlines()[-1]

    run.met = met
    return run


def test_dispatch_and_node_decide_who_sends_what_to_whom(told):
    def exchanges(*options):
        cfg, place = told("--mesh", "data=4,expert=4", *options)
        form = dispatch(cfg, place.mesh, place.rules)
        return form, {key for key in traffic(cfg, place, 2, 16, 1, "float32") if key[0] != "AllReduce"}

    everybody = (0, 1, 2, 3)
    assert exchanges() == exchanges("--dispatch", "alltoall") == ("alltoall", {("AllGather", everybody)})  # counts alone
    assert exchanges("--dispatch", "gather") == ("gather", {("AllGather", everybody), ("ReduceScatter", everybody)})
    two = "two_level", {("AllGather", (0, 1)), ("AllGather", (0, 2))}
    assert exchanges("--node", "2") == exchanges("--dispatch", "two_level", "--node", "2") == two


def test_layers_and_no_op_layers_decide_what_a_stage_holds(told):
    def layers(*options):
        cfg, place = told("--mesh", "pipe=2", "--accumulate", "4", *options)
        return [[chunk.layers for chunk in chunks(cfg, dataclasses.replace(place, rank=rank))] for rank in (0, 1)]

    assert layers() == [[(0,)], [(1,)]]
    assert layers("--noop-layers", "2,3") == layers("--layers", "2,0") == [[(0, 1)], [()]]
    assert layers("--noop-layers", "0,3") == [[(0,)], [(1,)]]
    assert layers("--pipeline", "dualpipev", "--virtual", "2", "--noop-layers", "0,3") == [[(), ()], [(0,), (1,)]]
    assert layers("--pipeline", "interleaved", "--virtual", "2", "--noop-layers", "1,2") == [[(0,), ()], [(), (1,)]]


@pytest.mark.parametrize("options, says", [
    ("--steps 2 --shard-size 2", "--shard-size is of a cut model: give --mesh too, or leave it out"),
    ("--sequence-parallel", "--sequence-parallel is of a cut model"),
    ("--mesh data=4,expert=4 --dispatch ring", "argument --dispatch: invalid choice: 'ring'"),
    ("--mesh data=4,expert=4 --dispatch two_level", "dispatch='two_level' without node"),
    ("--mesh data=4,expert=4 --dispatch two_level --node 3", "node=3 does not divide the 4 ranks that share the experts"),
    ("--mesh data=4,expert=4 --node 0", "node=0; expected how many expert-parallel ranks a node has"),
    ("--mesh data=4,expert=4 --node two", "argument --node: invalid int value: 'two'"),
    ("--mesh pipe=2 --noop-layers 1,x", "--noop-layers '1,x': expected whole numbers"),
    ("--mesh pipe=2 --noop-layers 2", "2 layers and 1 no-op layers, 3, are not divisible by 2 chunks; give 0 no-op layers"),
    ("--mesh pipe=2 --noop-layers 3,4", "no-op layers 3, 4: expected different positions from 0 to 3"),
    ("--mesh pipe=2 --noop-layers 2,3 --layers 1,1", "these are for an even split; drop one"),
    ("--mesh pipe=2 --layers 2", "expected 'even', or 2 numbers"),
    ("--mesh pipe=2 --pipeline interleaved --virtual 2", "micro_batches=1 is not divisible by pipe=2"),
    ("--mesh data=3", "--batch-size 8 is not divisible by data=3 times --accumulate 1"),
])
def test_options_that_cannot_be_are_refused_before_the_ranks_meet(told, options, says):
    assert says in told(*options.split()) and not told.met


def test_held_out_text_of_too_few_rows_is_refused_before_a_step(told):
    assert re.search(r"the held-out split has 4 rows of --seq-length 200, .* needs 8 \(2 data ranks times --accumulate 4\)",
                     told("--mesh", "data=2", "--seq-length", "200", "--accumulate", "4"))
