"""What a run shows and keeps: a progress bar, a line of JSON a step, TensorBoard when installed, a PNG of the curve."""
from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


class Report:
    """The ``log`` of ``train``: call it with records; ``close`` draws ``loss.png``.

    folder: where ``metrics.jsonl`` (and ``tensorboard/``, when that package is installed) goes. steps: the run's total.
    start: steps done already; later lines of an earlier run are dropped, so that a resumed log has no step twice.
    """

    def __init__(self, folder: str | Path, steps: int, start: int = 0, show: bool = True) -> None:
        from tqdm import tqdm

        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self.records = keep_until(self.path, start)
        self.file = self.path.open("a", encoding="utf-8")
        self.bar = tqdm(total=steps, initial=start, disable=not show, file=sys.stderr, dynamic_ncols=True, unit="step",
                        smoothing=0.05)
        self.board = _tensorboard(self.folder)

    def __call__(self, record: dict[str, Any]) -> None:
        """Keep one record of ``train`` and show it."""
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board:
            for key, value in record.items():
                if key != "step":
                    self.board.add_scalar(key, value, record["step"])
        if "loss" in record:
            self.bar.update(1)
            self.bar.set_postfix_str(summary(record))
            if record.get("skipped"):
                self.bar.write(f"step {record['step']}: not finite, nothing changed ({summary(record)})", file=sys.stderr)
        else:
            shown = ", ".join(f"{k.removeprefix('eval_')} {v:.3f}" for k, v in record.items() if k in
                              ("eval_main_loss", "eval_mtp_loss", "eval_balance"))
            self.bar.write(f"step {record['step']}: held out: {shown}", file=sys.stderr)

    def close(self, marks: dict[str, float] | None = None) -> Path | None:
        """End the bar and the files; draw the curve with horizontal ``marks`` (name -> loss). Returns the PNG's path."""
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()
        return draw(self.records, self.folder / "loss.png", marks or {})


def summary(record: dict[str, Any]) -> str:
    """One line of a step: losses, balance, gradient, rate, speed."""
    speed = record["tokens"] / max(record["seconds"], 1e-9)
    balance = f" max/mean load {record['balance']:.2f}" if "balance" in record else ""
    return (f"loss {record['main_loss']:.3f} mtp {record['mtp_loss']:.3f}{balance} grad {record['grad_norm']:.2f} "
            f"lr {record['learning_rate']:.1e} {speed:,.0f} tokens/s")


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a log up to ``step``; what came after, or was cut off by a crash, is dropped from the file."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the line being written when the process was killed
            if record["step"] > step:
                break
            records.append(record)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        os.replace(temporary, path)
    return records


def draw(records: list[dict[str, Any]], path: Path, marks: dict[str, float]) -> Path | None:
    """The loss curve as a PNG; None, and no file, without matplotlib or without records."""
    steps = [r for r in records if "loss" in r]
    if not steps or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in steps], [r["main_loss"] for r in steps], label="training loss", linewidth=1)
    if any(r["mtp_loss"] for r in steps):
        axes.plot([r["step"] for r in steps], [r["mtp_loss"] for r in steps], label="MTP loss", linewidth=1, alpha=0.7)
    held = [r for r in records if "eval_main_loss" in r]
    if held:
        axes.plot([r["step"] for r in held], [r["eval_main_loss"] for r in held], "o-", label="held out", markersize=4)
    for name, value in marks.items():
        axes.axhline(value, linestyle="--", linewidth=1, color="grey")
        axes.text(0.99, value, name, ha="right", va="bottom", transform=axes.get_yaxis_transform(), fontsize=8)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
    return path


def _tensorboard(folder: Path) -> Any:
    for package in ("tensorboardX", "torch.utils.tensorboard"):
        root = package.split(".")[0]
        if importlib.util.find_spec(root) and (root != "torch" or importlib.util.find_spec("tensorboard")):
            return importlib.import_module(package).SummaryWriter(str(folder / "tensorboard"))
    return None
