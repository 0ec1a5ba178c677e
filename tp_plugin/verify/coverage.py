"""Every architecture of the installed transformers, examined one by one, and the table of what was found.

Nothing in the table is typed in. Each architecture is examined by freshly forked ranks with a time limit; what they
find is written to a JSON after each, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.mesh import ParallelMesh
from tp_plugin.verify.check import examined, on_meta, short, whole
from tp_plugin.verify.complete import complete
from tp_plugin.verify.ranks import Launch
from tp_plugin.verify.scale import configs_in
from tp_plugin.verify.specimen import architectures, class_named, config_for

WORTH_NAMING = 0.002
"""Share of the parameters from which a replicated tensor is named."""
LIBRARIES = ("tp-plugin", "torch", "transformers")
COUNTS_UP_TO = 0.60
"""Share of the parameters on the fullest of two ranks beyond which parity says little: what is whole is equal."""


@dataclasses.dataclass
class Row:
    """What was found of one architecture.

    Attributes:
        model_type: of its config.
        kind: which head, of ``specimen.HEADS``.
        class_name: the model class.
        tp: ranks.
        verdict: of :class:`~tp_plugin.verify.parity.Parity`, or "refused" when the full model has no plan.
        sentence: why the verdict is not "equal".
        errors: relative errors of the small copy by quantity.
        worst: the parameter whose gradient differs most.
        measured_on: what the next six are of: "default config", "completed config" (``complete.py``) or "small copy".
        parameters, fraction, mean, source, replicated, reasons: of :class:`~tp_plugin.verify.check.Whole`, without
            small tensors.
        unreached: placed modules that the copy's inputs did not reach.
        precision: of the comparison.
        note: why it was not measured on the default config.
        versions: of the libraries it was found with.
        date: when.
        seconds: how long it took.
    """

    model_type: str
    kind: str
    class_name: str
    tp: int
    verdict: str = "untested"
    sentence: str = ""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    worst: str = ""
    measured_on: str = ""
    parameters: int = 0
    fraction: float = 1.0
    mean: float = 1.0
    source: str = ""
    replicated: dict[str, float] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    unreached: list[str] = dataclasses.field(default_factory=list)
    precision: str = ""
    note: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    date: str = ""
    seconds: float = 0.0

    @property
    def counts(self) -> bool:
        """Equal, and sharded enough for that to mean something."""
        limit = COUNTS_UP_TO if self.tp == 2 else 1 / self.tp + 0.10
        return self.verdict == "equal" and self.fraction <= limit


def versions() -> dict[str, str]:
    """What is installed; a source tree that was never installed has no version of its own."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source tree"
    return found


def cover(
    names: Iterable[str],
    tp: int = 2,
    *,
    jobs: int = 2,
    timeout_s: float = 120.0,
    known: dict[str, Row] | None = None,
    found: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Examine architectures, ``jobs`` at a time.

    Args:
        names: model types, of ``specimen.architectures()``.
        tp: ranks for each.
        timeout_s: for each; what takes longer is "broken".
        known: rows that need not be found again.
        found: called with every row as it is found.
    """
    table, rows, running = architectures(), dict(known or {}), {}  # type: ignore[var-annotated]
    waiting = [name for name in names if name not in rows]
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[name] = Launch(tp, _on_this_rank, name, *table[name], tp, timeout_s=timeout_s), time.monotonic()
        for name, (launch, started) in list(running.items()):
            if launch.done():
                del running[name]
                row = _row(name, *table[name], tp, launch.outcomes())
                row.seconds = time.monotonic() - started
                rows[name] = row
                found(row)
        time.sleep(0.02)
    return [rows[name] for name in sorted(rows)]


def _row(name: str, kind: str, class_name: str, tp: int, outcomes: list[tuple[str, Any]]) -> Row:
    row = Row(name, kind, class_name, tp, versions=versions(), date=date.today().isoformat())
    order = ("error", "died", "hung")
    failed = sorted((order.index(how), text) for how, text in outcomes if how != "value")
    if failed:
        row.verdict, row.sentence = "broken", _last_line(failed[0][1])
        return row
    return dataclasses.replace(row, **outcomes[0][1])


def _on_this_rank(model_type: str, kind: str, class_name: str, tp: int) -> dict[str, Any]:
    """What one rank finds, as fields of a Row; rank 0's is taken."""
    from transformers import AutoConfig

    options = TensorParallelConfig(tp_size=tp, quiet=True)
    model_class = class_named(class_name)
    try:
        config = config_for(model_class, AutoConfig.for_model(model_type))
    except Exception as failure:
        return {"sentence": f"transformers cannot build its default config: {short(failure)}"}
    found, options = examined(model_class, config, options, ParallelMesh.create(tp))
    row = {name: getattr(found, name) for name in ("verdict", "sentence", "errors", "worst", "unreached", "precision")}
    row |= {"fraction": found.fraction, "measured_on": "small copy"}
    if dist.get_rank() == 0:
        row |= _full_size(model_class, config, options)
    return row


def _full_size(model_class: type[nn.Module], config: Any, options: TensorParallelConfig) -> dict[str, Any]:
    """What the fullest rank would hold of the default config; where that cannot be built, of it made complete."""
    note = ""
    for measured_on in ("default config", "completed config"):
        try:
            full = whole(on_meta(model_class, config), options)
        except Exception as failure:
            note = note or f"its default config cannot be built: {short(failure)}"
            config = copy.deepcopy(config)
            for part in configs_in(config):
                complete(part)
            continue
        row: dict[str, Any] = {name: getattr(full, name) for name in ("parameters", "fraction", "mean", "source")}
        row["replicated"] = {name: share for name, share in full.replicated.items() if share >= WORTH_NAMING}
        row["reasons"] = {name: full.reasons[name] for name in row["replicated"]}
        row |= {"measured_on": measured_on, "note": note}
        return row | ({"verdict": "refused", "sentence": full.refused} if full.refused else {})
    return {"note": note}


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def load(file: Path, tp: int) -> dict[str, Row]:
    """Rows of an earlier run at this degree and these versions, by model type."""
    if not file.exists():
        return {}
    rows = [Row(**entry) for entry in json.loads(file.read_text())]
    return {row.model_type: row for row in rows if row.tp == tp and row.versions == versions()}


def save(file: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON, whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    part.replace(file)


def chosen(only: str | None) -> list[str]:
    """Model types that match a pattern (``*``) or a comma-separated list of them; all without one."""
    names = list(architectures())
    if only is None:
        return names
    return [name for name in names if any(fnmatch.fnmatchcase(name, part) for part in only.split(","))]


def environment() -> str:
    """The versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions().items()) + " on a CPU"
