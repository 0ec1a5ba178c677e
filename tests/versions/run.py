"""The doctor and the sample in one environment, as a record for JSON."""

from __future__ import annotations

import collections
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.support.ranks import ROOT
from tests.versions.environment import environment
from tests.versions.sets import Part, VersionSet, sample
from tp_plugin.integrations import features

LIMIT_S = 1800.0
"""Time after which the sample of a set is ended; it is to take less than 480 s on two quiet cores."""


def run(one: VersionSet, python: Path, workers: int) -> dict[str, Any]:
    """What the doctor says and what the sample gives: passed, failed, refused by a feature, or left out."""
    began = time.monotonic()
    examined = doctor(python)
    refusals = {part.name: one.lacks.get(part.name) or refused(part, examined) for part in sample()}
    ran = [part for part in sample() if refusals[part.name] is None]
    results, log = tests(python, ran, workers)
    parts = [{"part": part.name, "refused": refusals[part.name], **_of(part, results)} for part in sample()]
    lost = [line["text"] for line in examined if line["state"] == "lost"]
    return {
        "set": one.name,
        "of": one.of,
        "needs": one.needs,
        "versions": {line["subject"]: line["text"].split(";")[0] for line in examined if line["part"] == "libraries"},
        "lost": lost,
        "self_test": next((line["text"] for line in examined if line["part"] == "self-test"), "not run"),
        "parts": parts,
        "seconds": round(time.monotonic() - began),
        "right": all(_right(part) for part in parts) and not _broken(examined),
        "log": log,
    }


def _right(part: dict[str, Any]) -> bool:
    """Return True if a part was refused, or something of it passed and nothing failed."""
    return part["refused"] is not None or (part["passed"] > 0 and not part["failed"])


def doctor(python: Path) -> list[dict[str, str]]:
    """Lines of ``tp-plugin doctor --json``."""
    command = [python, "-m", "tp_plugin.launch.cli", "doctor", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(python), capture_output=True, text=True, timeout=600, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"tp-plugin doctor failed in {python}:\n{done.stderr[-2000:]}")
    return lines


def _broken(examined: list[dict[str, str]]) -> bool:
    return any(line["part"] == "self-test" and line["state"] == "lost" for line in examined)


def refused(part: Part, examined: list[dict[str, str]]) -> str | None:
    """Why the part cannot run here: the sentence of a feature that is broken, or a library that is not installed."""
    absent = {line["subject"] for line in examined if line["part"] == "libraries" and line["state"] == "none"}
    for name in part.needs:
        feature: features.Feature = getattr(features, name)
        if feature.library in absent:
            return f"{feature.library} is not installed"
        begin = f"tp_plugin refuses {feature.name} with "
        sentence = next((line["text"] for line in examined if line["text"].startswith(begin)), None)
        if sentence is not None:
            return sentence
    return None


def tests(python: Path, parts: list[Part], workers: int) -> tuple[dict[str, dict[str, Any]], str]:
    """Results of the parts' tests by their ids, and the end of pytest's output."""
    ids = list(dict.fromkeys(test for part in parts for test in part.tests))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1", "-rfE"]
        parallel = ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
        command = [python, "-m", "pytest", *options, *parallel, *ids]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(python), capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        if done.returncode not in (0, 1):  # 1: a test has failed
            raise RuntimeError(f"pytest did not run the sample in {python}:\n{(done.stdout + done.stderr)[-2000:]}")
        cases = ElementTree.parse(report).iter("testcase")
        found = {f"{case.get('file')}::{case.get('name')}": _outcome(case) for case in cases}
    for test in ids:
        name = test.partition("::")[2]
        if not any(key == test or (not name and key.startswith(f"{test}::")) for key in found):
            found[test] = {"outcome": "failed", "text": "it was not collected", "seconds": 0.0}
    return found, (done.stdout + done.stderr)[-4000:] if done.returncode else ""


def _outcome(case: ElementTree.Element) -> dict[str, Any]:
    text = {"outcome": "passed", "text": ""}
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            outcome = "skipped" if child.tag == "skipped" else "failed"
            text = {"outcome": outcome, "text": (child.get("message") or "")[:500]}
    return text | {"seconds": float(case.get("time", 0))}


def _of(part: Part, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    mine = {key: one for key, one in results.items() if any(key == t or key.startswith(f"{t}::") for t in part.tests)}
    counts = collections.Counter(one["outcome"] for one in mine.values())
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "seconds": round(sum(one["seconds"] for one in mine.values()), 1),
        "failures": {key: one["text"] for key, one in mine.items() if one["outcome"] == "failed"},
    }
