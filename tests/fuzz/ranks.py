"""The cases of one world, one after another in the same ranks; the parent reads what each rank writes down."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import sys
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

from tests.fuzz import sabotages
from tests.fuzz.build import LATER, seed_all
from tests.fuzz.case import Case
from tests.fuzz.judge import REPLICAS, beyond, differences
from tests.fuzz.train import Undrawable, sharded, shared, truth

EQUAL, REFUSED, UNDRAWABLE = "equal", "refused", "undrawable"  # these are no findings
WRONG, STOPPED, RAISED = "wrong", "stopped", "raised"
PATIENCE_S = 150  # of a case; then its ranks write down where they are, and end


class Spoilt(Exception):
    """The ranks of this world no longer agree where they are; the rest of the cases want a new one."""


def run_cases(texts: list[str], folder: str, sabotaged: dict[int, str]) -> None:
    """Each case in turn; a line of ``{folder}/{rank}.jsonl`` each.

    ``sabotaged``: seed -> a function of :mod:`tests.fuzz.sabotages` that breaks something in its sharded run.
    """
    store = dist.FileStore(f"{folder}/store", dist.get_world_size())
    with open(f"{folder}/{dist.get_rank()}.jsonl", "a", buffering=1) as out:
        for text in texts:
            case = Case.from_json(text)
            faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
            since = time.monotonic()
            found = outcome(case, sabotaged.get(case.seed, ""))
            out.write(json.dumps(found | {"seed": case.seed, "seconds": time.monotonic() - since}) + "\n")
            agreed(store, case.seed, found)
            gc.collect()
    faulthandler.cancel_dump_traceback_later()


def agreed(store: Any, seed: int, found: dict[str, Any]) -> None:
    """Go on where all ranks ended the case alike, by themselves; else raise :class:`Spoilt` on all.

    A rank that raised does not wait: its end is what its peers in a collective notice.
    """
    if found["kind"] == RAISED:
        raise Spoilt(seed)
    store.set(f"{seed}/{dist.get_rank()}", f"{found['kind']} {'' if found['kind'] == WRONG else found['said']}")
    if len({store.get(f"{seed}/{rank}") for rank in range(dist.get_world_size())}) > 1:
        raise Spoilt(seed)


def outcome(case: Case, sabotage: str) -> dict[str, Any]:
    """How the case ended on this rank: ``kind``, what it ``said``, and the ``errors`` measured."""
    from tp_plugin import TensorParallelError

    try:
        seed_all()
        return compared(case, sabotage)
    except Undrawable as failure:
        return {"kind": UNDRAWABLE, "said": str(failure)[:500]}
    except TensorParallelError as failure:
        traceback.print_exc()
        return {"kind": STOPPED if in_training(failure) else REFUSED, "said": str(failure)}
    except Exception as failure:
        said = f"{type(failure).__name__}: {_short(str(failure))}"
        frames = "".join(traceback.format_tb(failure.__traceback__))
        print(frames, said, file=sys.stderr)
        return {"kind": RAISED, "said": said, "trace": f"{frames[-4000:]}{said}"}


def in_training(failure: Exception) -> bool:
    """Whether the guard of the first step refused, or anything else after a step was made."""
    frames = traceback.extract_tb(failure.__traceback__)
    ours = [f for f in frames if "/tp_plugin/" in f.filename and not f.filename.endswith("/errors.py")]
    # what a layer refused in a run of the guard's is told to all by _tried; trial.py tries rules before training
    guard = bool(ours) and "/step_guard/" in ours[-1].filename and ours[-1].name != "_try"
    guard = guard and not ours[-1].filename.endswith("/trial.py")
    return guard or LATER in getattr(failure, "__notes__", ()) or any(frame.name == "evaluate" for frame in frames)


def _short(text: str) -> str:
    """Begin and end; DeepSpeed's messages hold whole tensors."""
    text = " ".join(text.split())
    return text if len(text) < 400 else f"{text[:150]} ... {text[-200:]}"


def compared(case: Case, sabotage: str) -> dict[str, Any]:
    expected = shared(lambda: truth(case))
    seed_all()
    with getattr(sabotages, sabotage)() if sabotage else contextlib.nullcontext():
        ours = sharded(case)
    errors = differences(ours, expected, ours.tp_rank)
    wrong = beyond(case, errors)
    anywhere = torch.tensor(float(bool(wrong)))
    dist.all_reduce(anywhere)
    if anywhere:
        noise = shared(lambda: differences(truth(case), truth(case, torch.float64), None))
        wrong = beyond(case, errors, noise)
        anywhere = torch.tensor(float(bool(wrong)))
        dist.all_reduce(anywhere)
    if not ours.replicas <= REPLICAS:
        wrong["replicas"] = f"replicas differ by {ours.replicas:.1e}"
        anywhere += 1
    return {
        "kind": WRONG if anywhere else EQUAL, "said": "; ".join(wrong.values()),
        "errors": {kind: error for kind, (error, _) in errors.items()} | {"replicas": ours.replicas},
    }  # fmt: skip
