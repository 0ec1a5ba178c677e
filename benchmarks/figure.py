"""The figure of the README: what a benchmark measured of tp_plugin, as a share of what it measured of AutoTP.

    python -m benchmarks.figure [docs/figures/autotp.svg]        needs matplotlib (the ``bench`` extra)

Reads ``benchmarks/results``, and writes nothing that is not in there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
OURS, PEER = "#2563a8", "#c8cdd3"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One pair of figures: a title, ours, the peer's, and how a figure is written."""

    title: str
    ours: float
    peer: float
    form: str


def latest(name: str) -> dict[str, Any]:
    """Return the newest result whose file begins with ``name``; dates end the names."""
    return json.loads(sorted(RESULTS.glob(f"{name}_*.json"))[-1].read_text())


def bars() -> list[Bar]:
    """Read the five pairs of the figure."""
    step, files, loss = latest("step_time_cpu_tp2"), latest("load_save_cpu_tp4"), latest("loss_cpu_tp2")
    seconds, wire, disk = step["median_seconds"], step["a_step_on_rank_0"], files["results"]
    peers = loss["results"][0]["peers"]
    megabytes = [peers[name]["extra_bytes"] / 1e6 for name in ("ours", "deepspeed torch")]
    return [
        Bar("time of a training step (tp 2)", seconds["tp_plugin"], seconds["autotp"], "{:.2f} s"),
        Bar(
            "bytes sent in a step (tp 2)",
            wire["tp_plugin"]["bytes"] / 1e6,
            wire["autotp"]["bytes"] / 1e6,
            "{:.0f} MB",
        ),
        Bar(
            "peak of a rank from start to engine,\nof the checkpoint's size (tp 4)",
            disk["tp_plugin"]["peak_over_checkpoint"],
            disk["autotp"]["peak_over_checkpoint"],
            "{:.2f}",
        ),
        Bar(
            "peak of a rank while saving,\nof the checkpoint's size (tp 4)",
            disk["tp_plugin"]["peak_of_saving_over_checkpoint"],
            disk["autotp"]["peak_of_saving_over_checkpoint"],
            "{:.2f}",
        ),
        Bar("memory of the loss,\n2048 tokens x 32,000 words (tp 2)", *megabytes, "{:.0f} MB"),
    ]


def draw(path: Path) -> None:
    """Write the figure as SVG, the same bytes from the same results."""
    matplotlib.rcParams.update({"svg.hashsalt": "tp-plugin", "font.size": 10, "font.family": "DejaVu Sans"})
    found = bars()
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    for place, bar in enumerate(reversed(found)):
        axes.barh(place + 0.19, bar.ours / bar.peer, 0.34, color=OURS, label="tp-plugin" if place == 0 else None)
        axes.barh(place - 0.19, 1.0, 0.34, color=PEER, label="DeepSpeed AutoTP" if place == 0 else None)
        axes.text(bar.ours / bar.peer + 0.01, place + 0.19, bar.form.format(bar.ours), va="center", color=OURS)
        axes.text(1.01, place - 0.19, bar.form.format(bar.peer), va="center", color="#555b63")
    axes.set_yticks(range(len(found)), [bar.title for bar in reversed(found)])
    axes.set_xticks([])
    axes.set_xlim(0, 1.16)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, transparent=False)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/figures/autotp.svg")
