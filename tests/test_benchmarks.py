"""The benchmarks run, at sizes too small to mean anything, and report what they promise."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.ranks import ROOT


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_benchmark_reports(tmp_path, ranks):
    out = tmp_path / "result.json"
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "benchmarks.loss", "--smoke", "--rounds", "2", "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert {"date", "machine", "versions", "setup", "results"} <= report.keys()
    (result,) = report["results"]
    expected = {"ours", "ours, recompute", "deepspeed torch", "deepspeed fused"}
    expected |= {"plain", "torch linear_cross_entropy"} if ranks == 1 else {"torch loss_parallel"}
    assert result["peers"].keys() == expected
    for found in result["peers"].values():
        assert found["seconds"] > 0
        assert found["relative_error"] <= 1e-4
    assert result["peers"]["ours"]["ours_time_ratio"] == 1.0
    collectives = {name: found["collectives"] for name, found in result["peers"].items()}
    assert collectives["ours"] == (0 if ranks == 1 else 2)  # one chunk: statistics, and the hidden gradient
    assert all(reason for reason in result["not_run"].values())
