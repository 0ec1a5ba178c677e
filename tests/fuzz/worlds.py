"""Runs cases in forked worlds, one for each (world, tp); a case that does not end alike on all ranks ends its world."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case
from tests.fuzz.ranks import EQUAL, PATIENCE_S, RAISED, REFUSED, UNDRAWABLE, WRONG, run_cases
from tests.support.ranks import outcomes

PER_WORLD = 25  # cases until the ranks are forked anew: engines leave things behind
ENVIRONMENT = {"ACCELERATE_USE_DEEPSPEED": "true", "MKL_CBWR": "COMPATIBLE"}
"""MKL's products otherwise depend on where a replica lies in each rank's flat buffer, by a unit in the last place."""


@dataclasses.dataclass
class Verdict:
    """How a case ended. ``kind``: as of :mod:`tests.fuzz.ranks`, or "hung" or "died". ``log``: tracebacks."""

    case: Case
    kind: str
    said: str
    seconds: float = 0.0
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    log: str = ""

    @property
    def finding(self) -> bool:
        return self.kind not in (EQUAL, REFUSED, UNDRAWABLE)


def run(
    cases: Iterable[Case], tell: Callable[[Verdict], None] = lambda _: None, sabotaged: dict[int, str] | None = None
) -> list[Verdict]:
    """Run all, and ``tell`` of each as soon as it has ended; ``sabotaged`` as of :func:`tests.fuzz.ranks.run_cases`."""
    found: list[Verdict] = []

    def keep(verdict: Verdict) -> None:
        found.append(verdict)
        tell(verdict)

    worlds: dict[tuple[int, int], list[Case]] = {}
    for case in cases:
        worlds.setdefault((case.world, case.tp), []).append(case)
    for (world, _), waiting in sorted(worlds.items()):
        while waiting:
            done = _launch(world, waiting[:PER_WORLD], keep, sabotaged or {})
            waiting = waiting[done:]
    return found


def _launch(world: int, cases: list[Case], tell: Callable[[Verdict], None], sabotaged: dict[int, str]) -> int:
    """One world; the number of cases that have a verdict, at least one."""
    texts = [case.to_json() for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        reader = _Reader(Path(folder), world, cases, tell)
        ranks = outcomes(world, run_cases, texts, folder, sabotaged, timeout_s=PATIENCE_S * len(cases), env=ENVIRONMENT)
        reader.stop()
        if reader.told < len(cases) and not (reader.told and all(r["ok"] or r["kind"] == "Spoilt" for r in ranks)):
            tell(_broken(cases[reader.told], [of_rank[reader.told :][:1] for of_rank in reader.lines()], ranks))
            return reader.told + 1
        return reader.told


class _Reader:
    """Tells of each case when all ranks have written its line, from a thread while the world runs.

    (The world itself is the main thread's: ranks die with the thread that their parent was started from.)
    """

    def __init__(self, folder: Path, world: int, cases: list[Case], tell: Callable[[Verdict], None]) -> None:
        self.files = [folder / f"{rank}.jsonl" for rank in range(world)]
        self.cases, self.tell, self.told, self.over = cases, tell, 0, threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.over.set()
        self.thread.join()
        self._read()

    def lines(self) -> list[list[dict[str, Any]]]:
        texts = [file.read_text() if file.exists() else "" for file in self.files]
        return [[json.loads(line) for line in text.split("\n")[:-1]] for text in texts]

    def _follow(self) -> None:
        while not self.over.wait(0.2):
            self._read()

    def _read(self) -> None:
        lines = self.lines()
        while self.told < min(map(len, lines)):
            self.tell(_verdict(self.cases[self.told], [of_rank[self.told] for of_rank in lines]))
            self.told += 1


def _verdict(case: Case, ends: list[dict[str, Any]]) -> Verdict:
    """Of the ends of all ranks. Ranks that end unlike, or say unlike why they refuse, count as if one had raised."""
    kinds, sentences = {end["kind"] for end in ends}, {end["said"] for end in ends}
    errors: dict[str, float] = {}
    for end in ends:
        errors |= {kind: max(error, errors.get(kind, 0.0)) for kind, error in end.get("errors", {}).items()}
    if kinds == {WRONG}:
        kind, said = WRONG, max(sentences, key=len)  # all ranks say the same but for updates, which rank 0 has
    elif len(kinds) == len(sentences) == 1:
        kind, said = ends[0]["kind"], ends[0]["said"]
    else:
        kind, said = RAISED, _by_rank([f"{end['kind']}: {end['said']}" for end in ends])
    return Verdict(
        case, kind, said, max(e["seconds"] for e in ends), errors, "\n".join(e.get("trace", "") for e in ends)
    )


def _by_rank(texts: list[str]) -> str:
    return " | ".join(f"rank {rank}: {text[:400]}" for rank, text in enumerate(texts))


def _broken(case: Case, ends: list[list[dict[str, Any]]], ranks: list[dict]) -> Verdict:
    """A case in which ranks hung or died."""
    kinds = {rank["kind"] for rank in ranks if not rank["ok"]}
    pairs = zip(ends, ranks, strict=True)
    said = _by_rank([end[0]["said"] if end else rank.get("kind", "no verdict") for end, rank in pairs])
    log = "\n".join(rank["log"][-3000:] for rank in ranks)
    return Verdict(case, "hung" if "Hang" in kinds or "Timeout (" in log else "died", said, log=log)
