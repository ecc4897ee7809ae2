"""Benchmarks: every measurement runs on a micro model and says what it promises. Nothing here judges a speed.

Planted faults it was seen to catch: tokens/s of one repeat divided by the repeats; the spread's median
replaced by its mean; FLOPs of a token instead of a step; the ratio turned upside down; the warm-up block
counted; a worker's idle time counted as busy; a worker that answers a request with one step too few; a
worker's death without its last words; the batches of the two sides drawn from different seeds; `--only` with
an unknown name accepted; a case of `kernels` whose native side is the reference; 12 bytes a parameter for 16;
the step that compiles counted by `data`; our worker training other params than the checkpoint's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MS_DEV_JIT_PIPELINE", "0")

import numpy as np
import pytest

from dsv3.bench import __main__ as cli
from dsv3.bench import blocks, data, depth, kernels, measure, peer, train
from dsv3.bench import cast as cast_bench
from dsv3.counts import counts

native_only = pytest.mark.skipif(
    os.environ.get("DSV3_KERNELS") == "reference", reason="compares the native kernels"
)


@pytest.fixture(scope="module")
def micro():
    """One MoE layer, without the losses that the peer lacks."""
    return depth.narrow(1).replace(
        first_k_dense_replace=0, num_nextn_predict_layers=0, vocab_size=64, aux_loss_alpha=0.0
    )


@pytest.fixture(scope="module")
def trained(micro):
    return train.train(micro, 2, 8, steps=2, repeats=3, warmup=1, with_peak=False)


def test_spread_is_median_and_extremes():
    assert measure.spread([4.0, 1.0, 100.0]) == {"median": 4.0, "min": 1.0, "max": 100.0, "n": 3}
    assert (
        measure.spread_text({"median": 4.0, "min": 1.0, "max": 1000.0, "n": 3}, 2)
        == "8.0 (2.0 to 2,000.0, of 3)"
    )


def test_tokens_are_the_same_everywhere():
    a, b = measure.tokens(64, 2, 8), measure.tokens(64, 2, 8)
    first = next(a)
    assert first.shape == (2, 8) and first.dtype == np.int32 and 0 <= first.min() and first.max() < 64
    np.testing.assert_array_equal(first, next(b))
    assert (next(a) != first).any()
    # what the other side draws, by its own code: NumPy's default generator of seed 0
    np.testing.assert_array_equal(first, np.random.default_rng(0).integers(0, 64, (2, 8), dtype=np.int32))


def test_train_and_its_table(micro, trained):
    r = json.loads(json.dumps(trained))
    assert r["flops_per_step"] == counts(micro, 8).train_flops * 16
    assert r["bytes_floor"] == 16 * r["parameters"] == 16 * counts(micro).main
    assert r["bytes"]["imported"] <= r["bytes"]["initialised"] <= r["bytes"]["trained"]
    assert r["step_seconds"]["n"] == r["tokens_per_second"]["n"] == 3
    assert r["tokens_per_second"]["max"] == pytest.approx(16 / r["step_seconds"]["min"])
    assert r["gflops"] == pytest.approx(r["flops_per_step"] / r["step_seconds"]["median"] / 1e9)
    assert r["compile_seconds"] > r["step_seconds"]["max"]
    assert abs(r["first_loss"] - np.log(64)) < 0.1 and r["machine"]["kernels"]
    text = train.table({"config": "micro"} | r)
    assert "tokens/s" in text and "16 bytes a parameter" in text


WORKER = """
import sys
sys.path.insert(0, {folder!r})
from blocks import serve, take_stdout
out, n = take_stdout(), [0]
print("noise that a library prints")
def step():
    n[0] += 1
    if n[0] > 6:
        raise ValueError("the last words")
    sum(range(300_000))
    return 10.0 + n[0]
serve(out, {{"name": "worker"}}, step)
"""


def test_worker_makes_the_steps_it_is_asked_for(tmp_path):
    side = peer.start(
        [sys.executable, "-c", WORKER.format(folder=str(Path(blocks.__file__).parent))], str(tmp_path)
    )
    assert peer.answer(side) == {"name": "worker"}
    seen = []
    for k in (2, 4):
        print(k, file=side.stdin, flush=True)
        got = peer.answer(side)
        assert len(got["seconds"]) == k and 0 <= got["idle_cpu"] < got["cpu"]
        seen += got["losses"]
    assert seen == [11.0, 12.0, 13.0, 14.0, 15.0, 16.0]
    print(1, file=side.stdin, flush=True)
    with pytest.raises(RuntimeError, match="ValueError: the last words"):
        peer.answer(side)
    peer.stop(side)


def test_comparison_of_two_sides():
    def block(seconds, loss, idle=0.01):
        return {
            "seconds": seconds,
            "losses": [loss] * len(seconds),
            "cpu": 2 * sum(seconds),
            "idle_cpu": idle,
            "peak_bytes": 7,
        }

    blocks_of = {
        "ours": [block([9.0, 9.0], 4.0), block([1.0, 3.0], 3.0), block([1.0, 1.0], 2.0)],
        "theirs": [block([1.0, 1.0], 4.0), block([6.0, 6.0], 3.0), block([2.0, 4.0], 2.5)],
    }
    r = peer.compare({"ours": {"name": "a"}, "theirs": {"name": "b"}}, blocks_of, 100)
    assert r["ratios"] == [3.0, 3.0] and r["ours"]["block_step_seconds"] == [2.0, 1.0]
    assert r["theirs"]["tokens_per_second"]["max"] == pytest.approx(100 / 3)
    assert r["theirs"]["fastest_step_seconds"] == 2.0 and r["ours"]["step_cpu_seconds"]["max"] == 4.0
    assert r["first_losses"] == [4.0, 4.0] and r["loss_gap"] == pytest.approx(0.2)


def test_peer_needs_transformers(micro, monkeypatch):
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--peer"):
        peer.peer(micro, 2, 8)


@pytest.mark.skipif(
    not (peer.importlib.util.find_spec("torch") and peer.importlib.util.find_spec("transformers")),
    reason="optional peer: torch and transformers",
)
def test_peer_does_the_same_work(micro):
    r = peer.peer(micro, 2, 8, steps=1, rounds=2)
    assert r["loss_gap"] < 1e-4 and len(r["ratios"]) == 2 and "ratio" in peer.table(r)


def test_our_worker_trains_the_checkpoint(micro, trained, tmp_path):
    """Our side of the comparison, in its own process: the loss of fresh params on the tokens that `train`
    sees too.
    """
    settings = peer.RECIPE | {"checkpoint": str(tmp_path / "model"), "batch": 2, "seq": 8, "threads": 1}
    peer.write_checkpoint(micro, settings["checkpoint"])
    side = peer.start([sys.executable, "-m", "dsv3.bench.peer_own", json.dumps(settings)], str(tmp_path))
    facts = peer.answer(side)
    print(2, file=side.stdin, flush=True)
    got = peer.answer(side)
    peer.stop(side)
    assert facts["parameters"] == counts(micro).main and facts["compile_seconds"] > 0
    assert (
        got["losses"][0] == pytest.approx(trained["first_loss"], rel=1e-5)
        and got["losses"][1] != got["losses"][0]
    )


@native_only
def test_kernels_compares_two_implementations(micro, capsys):
    assert cli.main(["kernels", "--only", "nothing"]) == 1
    assert "nothing" in capsys.readouterr().err
    r = kernels.kernels(micro, 2, 8, only=["count_experts", "swiglu"], calls=1, rounds=2)
    assert set(r["kernels"]) == {"count_experts", "swiglu"}
    assert r["kernels"]["swiglu"]["ratio"]["n"] == 2 and "swiglu" in kernels.table({"config": "micro"} | r)


def test_cases_pair_a_kernel_with_its_reference(micro, monkeypatch):
    """Each pair is handed over as (native, reference): seen by recording which functions a case is made
    of.
    """
    made = []
    monkeypatch.setattr(kernels, "gradient", lambda loss, params: made.append(_called_name(loss)))
    monkeypatch.setattr(kernels, "called", lambda fn, *args: made.append(_called_name(fn)))
    for name, (ours, reference) in kernels.cases(micro, 2, 8).items():
        if name == "adamw":
            continue
        made.clear()
        ours(), reference()
        assert made == [name, f"{name}_reference"]


def _called_name(fn):
    return dict(zip(fn.__code__.co_freevars, (c.cell_contents for c in fn.__closure__)))["fn"].__name__


@native_only
def test_cast_compares_the_same_work(capsys):
    for name, (ours, reference, _) in cast_bench.cases(130, 200).items():
        a, b = ours(), reference()
        if isinstance(b, np.ndarray) and isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, name)
    r = cast_bench.casts(130, 200, rounds=2, only=["widen"])
    assert r["casts"]["widen"]["ratio"]["n"] == 2 and "widen" in cast_bench.table(r)
    assert cli.main(["cast", "--only", "nothing"]) == 1 and "nothing" in capsys.readouterr().err


def test_data_feeds_the_step(micro):
    r = data.data(micro, 2, 8, steps=4, prefetch=2)
    assert r["wait_seconds"]["n"] == r["step_seconds"]["n"] == 4 and 0 < r["wait_share"] < 1
    assert "waiting" in data.table({"config": "micro"} | r)


def test_depth_reports_a_depth_that_fails():
    r = depth.depth((1,), 1, 8, timeout=0.01)
    assert r["rows"] == [{"layers": 1, "failed": "no result in 0 s"}] and "failed" in depth.table(r)


@native_only
def test_command_line_prints_json(tmp_path, micro, capsys):
    (tmp_path / "config.json").write_text(json.dumps(micro.to_hf()))
    assert (
        cli.main(
            [
                "kernels",
                "--config",
                str(tmp_path),
                "--batch",
                "1",
                "--seq",
                "8",
                "--only",
                "swiglu",
                "--rounds",
                "1",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["kernels"]["swiglu"]["native_ms"]["min"] > 0


def test_command_line_refuses_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dsv3.bench", "train", "--config", "NOPE"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=measure.child_environment(),
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "NOPE" in done.stderr
