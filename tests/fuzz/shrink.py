"""A smaller case that fails in the same way: each part is made the simplest there is, where it fails all the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from tests.fuzz.case import Case
from tests.fuzz.families import CAUSAL, CLASSES, FAMILIES
from tests.fuzz.worlds import Verdict, run

PLAIN = ("even", "some")


def shrunk(verdict: Verdict, rounds: int = 3) -> Case:
    """The smallest case found; each try launches a world, so this takes a few minutes."""
    case = verdict.case
    for _ in range(rounds):
        before = case
        for candidate in simpler(case):
            merged = _merged(case, candidate(case) if callable(candidate) else candidate)
            if merged != case and run([merged])[0].kind == verdict.kind:
                case = merged
        if case == before:
            break
    return case


def _merged(case: Case, change: dict) -> Case:
    without, more = change.get("without", ()), change.get("options", {})
    options = {key: value for key, value in case.options.items() if key not in without} | more
    rest = {key: value for key, value in change.items() if key not in ("without", "options")}
    return dataclasses.replace(case, **rest, options=options)


def simpler(case: Case) -> Iterator[dict | Callable[[Case], dict]]:
    """Changes of ``case``, the ones that spare most first. ``without`` are options to leave out.

    A function gives a change of the case as it is by then.
    """
    yield from ({"batches": [pair]} for pair in case.batches)
    for place in range(len(case.batches)):
        yield lambda now, place=place: {"batches": [PLAIN if i == place else p for i, p in enumerate(now.batches)]}
    yield from ({"adapter": None, "way": "slot"}, {"loop": "engine"}, {"dp": 1}, {"accumulation": 1}, {"rows": 1})
    yield from (
        {"way": "slot"},
        {"checkpointing": None},
        {"offload": False},
        {"guard": False},
        {"uneven": False},
        {"optimizer": "sgd"},
    )
    if FAMILIES[case.family].kind != CLASSES:
        yield {"loss": "mean", "direct": {}}
    if FAMILIES[case.family].kind == CAUSAL:
        yield {"loss": "items", "direct": {}}
    for stage in range(case.stage):
        yield lambda now, stage=stage: {"stage": min(stage, now.stage)}
    for key in (case.adapter or {}).keys() - {"kind", "r", "task_type", "target_modules"}:
        yield lambda now, key=key: {"adapter": now.adapter and {k: v for k, v in now.adapter.items() if k != key}}
    for key, value in case.options.items():
        if value is True:
            yield {"options": {key: False}}
        elif key in ("attn_implementation", "experts", "sliding_window", "hidden_act"):
            yield {"without": (key,)}
        elif "layers" in key and isinstance(value, int) and value > 1:
            yield {"options": {key: 1}}
