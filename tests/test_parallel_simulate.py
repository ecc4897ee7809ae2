"""Simulated Ascend ranks: the stand-in for CANN, the child process, and what is read from the compiled graph.

The collectives of a step that is divided both ways are held to a count made by hand, on every rank.

Planted faults this file was seen to catch, one at a time: symbols in the order of a set; Python's own symbols defined; the
empty map linked to another place; two data symbols in one; the page of an address on aarch64; a called subgraph counted once;
payload taken from what goes in only; gradients not told from the forward pass; uncounted graphs passed over; the mesh's axes
swapped in the target; the simulation's level ignored; the stand-in behind the user's libraries; the log's last lines left out;
threads that spin left alone, threads that wait put aside with them.
"""
import ctypes
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3.parallel import fake_cann, ir, simulate
from dsv3.parallel.ir import Collective

BATCH, WIDTH, HIDDEN = 16, 6, 20  # of parallel_targets, which imports MindSpore


# -- the stand-in ------------------------------------------------------------------------------------------------------
def content(folder):
    """{relative path: bytes or link target} of all files."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_symlink() or p.is_file())
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in files}


def test_generator_gives_the_same_bytes_again(tmp_path):
    """In two processes, because the order of a set of strings differs from one to the next."""
    code = "import sys; from pathlib import Path; from dsv3.parallel import fake_cann; fake_cann.generate(Path(sys.argv[1]))"
    for name in ("a", "b"):
        environment = os.environ | {"PYTHONHASHSEED": str(ord(name))}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, env=environment)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert a == b
    assert a["cann/lib64/libascendcl.so"] == "libstandin.so" and a["cann/lib64/driver/libascend_hal.so"] == "../libstandin.so"
    assert b"computes nothing" in a["README.txt"]
    names = {name for name, here, _, _ in fake_cann.Elf(tmp_path / "a/cann/lib64/libstandin.so").symbols() if here}
    assert {"aclrtMalloc", "HcclAllReduce", "aclnnMatmul", "aclnnMatmulGetWorkspaceSize"} <= names and len(names) > 1000
    assert not [name for name in names if name.startswith("Py")], "Python's own functions must not be shadowed"


def test_library_loads_and_returns_what_it_says(tmp_path):
    path = tmp_path / "lib.so"
    text, names = "_ZNK2ge12AscendString9GetStringEv", [f"f{i}" for i in range(300)]
    machine = fake_cann.MACHINES[os.uname().machine]
    path.write_bytes(fake_cann.shared_object(machine, "lib.so", [*names, text, fake_cann.STATUS_FACTORY], ["data", "more"]))
    library = ctypes.CDLL(str(path))
    assert all(getattr(library, name)() == 0 for name in names)
    getattr(library, text).restype = ctypes.c_char_p
    assert getattr(library, text)() == b""
    factory = getattr(library, fake_cann.STATUS_FACTORY)
    factory.restype = ctypes.c_void_p
    at = factory()
    words = (ctypes.c_uint64 * 6).from_address(at)
    assert list(words) == [0, 0, 0, at + 8, at + 8, 0], "an empty std::map: its header is its own neighbour"
    data = [(ctypes.c_char * fake_cann.OBJECT).in_dll(library, name) for name in ("data", "more")]
    assert [bytes(d) for d in data] == [bytes(fake_cann.OBJECT)] * 2
    assert abs(ctypes.addressof(data[0]) - ctypes.addressof(data[1])) >= fake_cann.OBJECT


def test_addresses_in_code_for_both_machines():
    """The instructions that load an address, decoded by hand: the other machine's cannot be run here."""
    x86, arm = fake_cann.MACHINES["x86_64"], fake_cann.MACHINES["aarch64"]
    for here, target in ((0x1234, 0x23450), (0x12340, 0x12388), (0x54321, 0x300010)):
        code = fake_cann._address_of(target, here, x86)
        assert here + 7 + struct.unpack("<i", code[3:7])[0] == target
        adrp, add, ret = struct.unpack("<III", fake_cann._address_of(target, here, arm))
        assert adrp & 0x9F00001F == 0x90000000 and add & 0xFFC003FF == 0x91000000 and ret == 0xD65F03C0
        pages = (adrp >> 29 & 3) | (adrp >> 5 & 0x7FFFF) << 2
        assert (here & ~0xFFF) + (pages << 12) + (add >> 10 & 0xFFF) == target


@pytest.mark.parametrize("name, kind", [
    ("_ZN2ge8OperatorC1Ev", "clear 24"), ("_ZN2ge5ShapeC2ERKS0_", "clear 16"), ("_ZNK2ge10TensorDesc8GetShapeEv", "give 16"),
    ("_ZNK2ge8Operator7GetNameEv", "give string"), ("_ZNK2ge8Operator7GetNameERNS_12AscendStringE", None), ("aclrtMalloc", None),
    ("_ZNK2ge12AscendString9GetStringEv", "empty text"), ("_ZN2ge7SessionC1Ev", None),
])
def test_bodies(name, kind):
    for machine in fake_cann.MACHINES.values():
        code = fake_cann.body(name, machine)
        assert (code is None) == (kind is None)
        if kind:
            x86, arm = fake_cann._CODE[kind]
            expected = bytes.fromhex(x86) if machine == 62 else b"".join(bytes.fromhex(w)[::-1] for w in arm.split())
            assert code == expected


def test_generator_refuses(tmp_path, monkeypatch):
    empty = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr(fake_cann.importlib.util, "find_spec", lambda name: empty)
        with pytest.raises(RuntimeError, match="no Ascend plugin"):
            fake_cann.generate(tmp_path / "out")
    monkeypatch.setattr(fake_cann.platform, "machine", lambda: "riscv64")
    with pytest.raises(RuntimeError, match="riscv64: expected linux on x86_64 or aarch64"):
        fake_cann.generate(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stand_in_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV3_CACHE", str(tmp_path))
    calls = []

    def generate(folder):
        calls.append(folder)
        (folder / "file").write_text("x")

    monkeypatch.setattr(fake_cann, "generate", generate)
    folder = fake_cann.ensure()
    assert fake_cann.ensure() == folder and len(calls) == 1 and [p.name for p in folder.iterdir()] == ["file"]
    assert [p for p in tmp_path.iterdir()] == [folder], "no temporary folder stays behind"


def test_real_cann_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    (tmp_path / "lib64").mkdir()
    assert fake_cann.real_cann() != tmp_path
    (tmp_path / "lib64" / "libascendcl.so").touch()
    assert fake_cann.real_cann() == tmp_path
    environment = simulate._environment(8, 3, 0, tmp_path, None)
    assert environment["LD_LIBRARY_PATH"] == "/somewhere" and environment["RANK_ID"] == "3"
    stand_in = simulate._environment(8, 3, 0, tmp_path, Path("/cache"))
    assert stand_in["LD_LIBRARY_PATH"] == "/cache/cann/lib64:/somewhere" and stand_in["PYTHONPATH"].startswith("/cache/python:")


# -- ranks -------------------------------------------------------------------------------------------------------------
def sum_over(*group, shape, backward):
    size = 4
    for n in shape:
        size *= n
    return Collective("AllReduce", "sum", group, "Float32", shape, size, backward, 1)


def by_hand(rank, data, model):
    """The step's collectives: over ``model`` the partial sums of the second product, and of its gradient, because MindSpore's
    gradient of a sum over ranks is a sum over ranks; over ``data`` the loss and each weight's gradient. Nothing over an axis
    of size 1."""
    row, column = rank // model, rank % model
    across = [column + model * i for i in range(data)]  # the ranks with this rank's part of the weights
    along = [row * model + i for i in range(model)]  # those with its rows
    expected = []
    if model > 1:
        expected += [sum_over(*along, shape=(BATCH // data, WIDTH), backward=backward) for backward in (False, True)]
    if data > 1:
        expected += [sum_over(*across, shape=(), backward=False)]
        expected += [sum_over(*across, shape=(WIDTH, HIDDEN // model), backward=True)]
        expected += [sum_over(*across, shape=(HIDDEN // model, WIDTH), backward=True)]
    return expected


@pytest.mark.parametrize("data, model, rank", [(2, 2, 0), (2, 2, 3), (4, 1, 2), (1, 4, 1)])
def test_collectives_equal_the_hand_count(data, model, rank):
    report = simulate.simulate("parallel_targets:two_products", {"data": data, "model": model}, 4, rank)
    assert sorted(map(repr, report.collectives)) == sorted(map(repr, by_hand(rank, data, model)))
    assert report.value == {"rank": rank} and report.device_bytes is None and report.program is None
    assert report.seconds > 0.05 and report.host_bytes > 100 << 20


def test_planned_memory(tmp_path):
    """Two weights of 60 MB: at the least they and their gradients, at the most a few copies more."""
    hidden = 60 * 2**20 // 4 // WIDTH
    kwargs = {"data": 1, "model": 1, "hidden": hidden}
    report = simulate.simulate("parallel_targets:two_products", kwargs, 1, 0, level=1, keep=tmp_path)
    weights = 2 * 4 * WIDTH * hidden
    activations = 4 * BATCH * hidden
    assert 2 * weights + activations <= report.device_bytes <= 4 * (weights + activations)
    assert report.collectives == () and (tmp_path / "rank_0" / "log.txt").exists()
    assert f"{report.device_bytes / 2**30:.2f} GiB" in simulate.summary(report)[0]


@pytest.mark.parametrize("target, options, error, words", [
    ("raises", {}, RuntimeError, ["rank 1 of 2", "line before the fault", "ValueError: this is the fault", "code 1"]),
    ("dies", {}, RuntimeError, ["SIGKILL"]),
    ("sleeps", {"timeout": 2.0}, TimeoutError, ["rank 1 of 2 of parallel_targets:sleeps did not finish within 2.0 s"]),
    ("compiles_nothing", {}, RuntimeError, ["nothing was compiled"]),
    ("missing", {}, RuntimeError, ["has no attribute 'missing'"]),
])
def test_broken_child_gives_its_last_lines(target, options, error, words):
    kwargs, before = {"word": "fault"} if target == "raises" else {}, children()
    with pytest.raises(error) as caught:
        simulate.simulate(f"parallel_targets:{target}", kwargs, 2, 1, **options)
    for word in words:
        assert word in str(caught.value)
    assert children() <= before  # none is left running


def children():
    """Processes of Python that this one has started, in this test or before it."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"PPid:\t{os.getpid()}\n" in text and "python" in text.split("\n")[0] and "State:\tZ" not in text:
            found.add(status.parent.name)
    return found


def test_threads_that_spin_get_out_of_the_way():
    """As those of a simulated device's streams do; one that waits for work keeps its rank."""
    done, threads = threading.Event(), []

    def spin():
        while not done.is_set():
            pass

    for target in (spin, done.wait):
        threads.append(threading.Thread(target=target))
        threads[-1].start()
    simulate.hush()
    spins, waits = (os.getpriority(os.PRIO_PROCESS, thread.native_id) for thread in threads)
    done.set()
    assert spins == 19 and waits == os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19


@pytest.mark.parametrize("options, words", [
    ({"rank": 4}, "expected 0 to 3"), ({"level": 2}, "expected level 0 or 1"), ({"export": True}, "say where with keep="),
    ({"export": True, "level": 1, "keep": "x"}, "and 0 to export"), ({"target": "json.dumps"}, "expected 'module:function'"),
])
def test_arguments_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        simulate.simulate(**{"target": "json:dumps", "kwargs": {}, "ranks": 4, "rank": 0} | options)


# -- the graph ---------------------------------------------------------------------------------------------------------
IR = """# IR entry: @top_9
subgraph @inner_7(%para1_x) {
  %0(y) = AllGather(%para1_x) {instance name: a} primitive_attrs: {group: "2-77", rank_size: I64(2)} cnode_attrs: {x: Bool(1)}
      : (<Tensor[BFloat16], (3, 5)>) -> (<Tensor[BFloat16], (6, 5)>)
      # Fullname with scope: (Default/AllGather-op0)
  %1(z) = PrimFunc_Add(%0, %0)
      : (<Tensor[BFloat16], (6, 5)>, <Tensor[BFloat16], (6, 5)>) -> (<Tensor[BFloat16], (6, 5)>)
  Return(%1)
}

subgraph @back_8(%para2_x, %para3_u) {
  %0(y) = ReduceScatter(%para2_x) primitive_attrs: {group: "g", op: "sum", group_rank_ids: (4, 6), rank_size: I64(2)}
      : (<Ref[Tensor[Float32]], (6, 5), ref_key=p>) -> (<Tensor[Float32], (3, 5)>)
      # Fullname with scope: (Gradients/Default/ReduceScatter-op0)
  Return(%0)
}

subgraph @top_9(%para4_x) {
  %0(a) = call @inner_7(%para4_x)
      : (<Tensor[BFloat16], (3, 5)>) -> (<Tensor[BFloat16], (6, 5)>)
  %1(b) = call @inner_7(%0) cnode_attrs: {micro: I64(1)}
      : (<Tensor[BFloat16], (3, 5)>) -> (<Tensor[BFloat16], (6, 5)>)
  %2(p) = Partial(@back_8, %1) primitive_attrs: {side_effect_propagate: I64(1)}
      : (<Func>, <Tensor[BFloat16], (6, 5)>) -> (<Func>)
  %3(c) = %2[@Partial(@back_8)](UMonad[U])
      : (<UMonad, NoShape>) -> (<Tensor[Float32], (3, 5)>)
  %6(c) = %2[@@back_8](UMonad[U])
      : (<UMonad, NoShape>) -> (<Tensor[Float32], (3, 5)>)
  %4(d) = Send(%3) {instance name: Send} primitive_attrs: {dst_global_rank: I64(12), group_rank_ids: (4, 12), sr_tag: I64(0)}
      : (<Tensor[Float32], (3, 5)>) -> (<Tensor[Float32], (3, 5)>)
  %5(e) = Receive(%4) primitive_attrs: {group: "s", group_rank_ids: (4, 12), src_global_rank: I64(12), sr_tag: I64(0), dtype: F32}
      : (<Tensor[Float32], ()>) -> (<Tensor[Float32], (3, 5)>)
  Return(%5)
}
"""


def read(tmp_path, text, rank=4):
    (tmp_path / "00_validate_0001.ir").write_text(text)
    groups = {"2-77": (4, 5)}
    return ir.read_collectives(ir.last_graph(tmp_path), rank, groups.__getitem__)


def test_collectives_of_called_graphs_count_for_every_call(tmp_path):
    found = read(tmp_path, IR)
    assert found == (
        Collective("AllGather", "", (4, 5), "BFloat16", (3, 5), 2 * 6 * 5, False, 2),
        Collective("Receive", "", (12, 4), "Float32", (3, 5), 4 * 3 * 5, False, 1),
        Collective("Send", "", (4, 12), "Float32", (3, 5), 4 * 3 * 5, False, 1),
        Collective("ReduceScatter", "sum", (4, 6), "Float32", (6, 5), 4 * 6 * 5, True, 2),
    )


@pytest.mark.parametrize("old, new, words", [
    ("%2[@@back_8](", "%2[@FuncUnion(@back_8, @inner_7)](", "cannot count the collectives of 'FuncUnion'"),
    ("# IR entry: @top_9", "# IR entry: @inner_7", "cannot count how often .'back_8', 'top_9'. run"),
    (', group_rank_ids: (4, 6)', "", None),
    ('group: "g", op: "sum", group_rank_ids: (4, 6), ', "", "names no group"),
    ("dst_global_rank: I64(12), ", "", "Send without dest_rank"),
    ("# IR entry: @top_9", "# IR entry: @other", "of 'other', which is called but not among"),
    ("<Ref[Tensor[Float32]], (6, 5), ref_key=p>) -> (<Tensor[Float32], (3, 5)>", "<A>) -> (<B>", "of a type that is not known"),
])
def test_graphs_that_cannot_be_counted(tmp_path, old, new, words):
    assert IR.count(old) == 1
    with pytest.raises(KeyError if words is None else ValueError, match=words):
        read(tmp_path, IR.replace(old, new))


def test_last_graph(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was compiled"):
        ir.last_graph(tmp_path)
    for n in (2, 10, 9):
        (tmp_path / f"21_validate_{n:04}.ir").touch()
    assert ir.last_graph(tmp_path).name == "21_validate_0010.ir"


@pytest.mark.parametrize("returned, types", [
    ("<Tuple[Tensor[Float32]*2,Tensor[Int32]], TupleShape((), (4, 3), (7)), elements_use_flags={[const vector]{1, 1, 1}}>",
     (("Float32", ()), ("Float32", (4, 3)), ("Int32", (7,)))),
    ("<Tuple[Ref[Tensor[BFloat16]]], TupleShape((2, 5))>", (("BFloat16", (2, 5)),)),
    ("<Tensor[Float32], ()>", (("Float32", ()),)),
])
def test_result_types(tmp_path, returned, types):
    path = tmp_path / "a.ir"
    inner = "subgraph @inner() {\n  Return(%0)\n      : (<Tensor[Bool], (9)>)\n}\n"
    path.write_text(f"# IR entry: @top_9\n{inner}subgraph @top_9(%a) {{\n  Return(%1) cnode_attrs: {{x: (1)}}\n"
                    f"      : ({returned})\n}}\n")
    assert ir.result_types(path) == types


@pytest.mark.parametrize("kind, parts", [
    ("AllReduce", 2 * 3 / 4), ("AllGather", 3 / 4), ("ReduceScatter", 3 / 4), ("AllToAll", 3 / 4), ("Broadcast", 1), ("Send", 1),
    ("Receive", 0),
])
def test_wire_bytes(kind, parts):
    assert Collective(kind, "", (0, 1, 2, 3), "Float32", (100,), 400, False, 7).wire_bytes == 400 * parts


def test_summary():
    collectives = (Collective("AllReduce", "sum", (0, 1), "Float32", (512, 1024), 2**21, True, 3),
                   Collective("AllGather", "", tuple(range(0, 512, 8)), "BFloat16", (256, 4), 2**21, False, 2))
    report = simulate.Report(rank=0, ranks=512, seconds=1.25, host_bytes=2**31, device_bytes=None, collectives=collectives,
                             graphs=(simulate.GraphReport("part", (), 0, 3, 1.0, collectives, None),), value=None,
                             program=None, cann="stand-in for CANN")
    head, columns, first, second, total, graph = simulate.summary(report)
    assert graph == "graph part: 3 calls of 5 collectives, compiled in 1.0 s"
    assert head == "rank 0 of 512: compiled in 1.2 s, host memory 2.00 GiB, stand-in for CANN"
    assert first.split() == ["AllReduce", "sum", "3", "backward", "0", "1", "Float32", "[512,", "1024]", "2.000", "6.000"]
    assert "64 ranks: 0 8 16 .. 504" in second and second.split()[-1] == f"{4 * 63 / 64:.3f}"
    assert total.split() == ["total", "5", f"{6 + 4 * 63 / 64:.3f}"]
    assert len({len(line) for line in (columns, first, second, total)}) == 1
