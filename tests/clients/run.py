"""Build a program's environment and run its cases by its own command."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tests.clients.compare import LIMITS, Outcome, differences, outcome
from tests.clients.program import ANSWERS, Case, Program, write_inputs
from tests.support.ranks import ROOT
from tests.versions import environment
from tests.versions.sets import sets

STUBS = Path(__file__).parent / "stubs"
LIMIT_S = 600.0
SHARDED = (Case("", 2, 2), Case("", 4, 2))
AUTOTP = Case("", 2, 2, ours=False)


def build(program: Program, folder: Path) -> Path:
    """The Python of the program's environment in ``folder``; it is built unless it is there."""
    of = sets()[program.of]
    needed = {Requirement(one).name for one in program.needs}
    libraries = tuple(one for one in of.libraries if Requirement(one).name not in needed)
    one = dataclasses.replace(of, name=f"client-{program.of}", libraries=(*libraries, *program.needs))
    python = environment.build(one, folder)
    stamp = python.parent.parent / "program.txt"
    if not stamp.exists() or stamp.read_text() != program.package:
        environment.install(python, "--no-deps", program.package)
        stamp.write_text(program.package)
    return python


def run(program: Program, python: Path, folder: Path, kinds: list[str]) -> dict[str, Any]:
    """What each kind gives in one process, sharded by tp_plugin, and under DeepSpeed's AutoTP."""
    inputs = folder / "inputs"
    shutil.rmtree(folder, ignore_errors=True)
    inputs.mkdir(parents=True)
    write_inputs(inputs)
    found: dict[str, Any] = {}
    for kind in kinds or program.kinds:
        alone = train(program, python, inputs, folder, Case(kind))
        found[kind] = {"one process": _numbers(alone)}
        for case in (*SHARDED, AUTOTP):
            case = dataclasses.replace(case, kind=kind)
            if kind in program.alone and case.world > case.tp:
                continue
            found[kind][case.name.removeprefix(f"{kind}-")] = against(
                alone, train(program, python, inputs, folder, case)
            )
    return found


def train(program: Program, python: Path, inputs: Path, folder: Path, case: Case) -> Outcome | str:
    """One training by the program's own command: what it reported and saved, or the sentence it ended with."""
    output = folder / re.sub(r"\W+", "-", case.name)
    output.mkdir()
    plain = environment.environment(python) | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{STUBS}:{ROOT}"}
    plain |= program.environment(Case(case.kind))
    steps = [(words, "", plain | program.environment(case) | _way_in(case)) for words in
             program.kinds[case.kind](inputs, case, output)]  # fmt: skip
    if case.kind in program.finish:
        steps += [(words, asked, plain) for words, asked in program.finish[case.kind](inputs, output)]
    log = ""
    for number, (words, asked, env) in enumerate(steps):
        file = output / f"log-{number}.txt"
        said = _said([str(python.parent / words[0]), *words[1:]], asked, env, file)
        answered = asked and file.exists() and re.search(program.answer, file.read_text(), re.MULTILINE)
        if isinstance(said, Failed) and not answered:  # LLaMA-Factory's chat may be aborted when it has said goodbye
            return said.replace(str(folder), "RUNS")
        log += file.read_text()
    try:
        found = outcome(output)
    except FileNotFoundError as missing:
        return str(missing)
    answers = output / ANSWERS
    found.answers = re.findall(program.answer, answers.read_text() if answers.exists() else log, re.MULTILINE)
    if case.kind in program.finish and not found.answers:
        return "its inference gave no answer"
    return found


class Failed(str):
    """The sentence that a command ended with."""


def _said(command: list[str], asked: str, env: dict[str, str], log: Path) -> str:
    """What a command prints, kept in ``log``."""
    try:
        done = subprocess.run(
            command, cwd=log.parent, env=env, timeout=LIMIT_S, check=False, input=asked,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Failed(f"no end after {LIMIT_S:.0f} s")
    log.write_text(done.stdout)
    return Failed(_sentence(done.stdout)) if done.returncode else done.stdout


def _way_in(case: Case) -> dict[str, str]:
    if case.tp == 1:
        return {}
    return {"TP_PLUGIN": "1"} if case.ours else {"CLIENTS_CPU_BACKEND": "1"}


def _sentence(log: str) -> str:
    """The first error of a rank in a log."""
    errors = re.findall(r"^(?:\[rank\d+\]: *)?((?:[\w.]*Error|[\w.]*Exception): .+)$", log, re.MULTILINE)
    ours = [one for one in errors if "TensorParallelError" in one]
    return (ours or errors or [log.strip().splitlines()[-1] if log.strip() else "it said nothing"])[0][:300]


def against(alone: Outcome | str, sharded: Outcome | str) -> dict[str, Any]:
    """Differences of a training to one process, or why there are none."""
    if isinstance(sharded, str):
        return {"error": sharded}
    if isinstance(alone, str):
        return {"error": "one process did not train"}
    apart = differences(alone, sharded)
    return {**_numbers(sharded), **apart, "right": all(apart[name] <= limit for name, limit in LIMITS.items())}


def _numbers(found: Outcome | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"error": found}
    return {"first loss": found.losses[0], "first norm": found.norms[0]} if found.losses else {"error": "no losses"}


def program_folder() -> Path:
    """Where outputs lie unless told otherwise."""
    return Path(os.environ.get("TP_CLIENT_RUNS", ROOT / ".clients"))
