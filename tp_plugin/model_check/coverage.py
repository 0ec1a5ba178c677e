"""Check every architecture of the installed transformers, and write the coverage table as JSON and Markdown.

Each architecture is checked by freshly forked ranks with a time limit. The JSON is written after each, so an
interrupted run resumes.
"""

from __future__ import annotations

import collections
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
from tp_plugin.model_check.check import check_on_ranks, full_model, on_meta, short
from tp_plugin.model_check.fork_server import Launch
from tp_plugin.model_check.parity import LIMITS
from tp_plugin.model_check.resolve_model import architectures, class_named, complete_config, config_for, configs_in

WORTH_NAMING = 0.002
"""Smallest share of the parameters at which a replicated tensor is named."""
LIBRARIES = ("tp-plugin", "torch", "transformers")
COUNTS_UP_TO = 0.60
"""Largest share of parameters on one of two ranks at which parity counts; replicated parameters are equal anyway."""


@dataclasses.dataclass
class Row:
    """Result for one architecture.

    Attributes:
        model_type: of its config.
        kind: its head, of ``resolve_model.HEADS``.
        class_name: the model class.
        tp: number of ranks.
        verdict: of :class:`~tp_plugin.model_check.parity.Parity`, or "refused" when the full model has no plan.
        sentence: the reason for a verdict other than "equal".
        errors: relative errors of the small copy by quantity.
        worst: the parameter whose gradient differs most.
        measured_on: source of the next six: "default config", "completed config" or "small copy".
        parameters, fraction, mean, source, replicated, reasons: of :class:`~tp_plugin.model_check.check.FullModel`,
            without small tensors.
        unreached: placed modules that the copy's inputs did not reach.
        precision: of the comparison.
        note: the reason if it was not measured on the default config.
        versions: of the libraries.
        date: of the check.
        seconds: time it took.
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
        """Equal, and sharded enough for that to count."""
        limit = COUNTS_UP_TO if self.tp == 2 else 1 / self.tp + 0.10
        return self.verdict == "equal" and self.fraction <= limit


def versions() -> dict[str, str]:
    """Installed versions; "source tree" for a package that is not installed."""
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
    """Check architectures, ``jobs`` at a time.

    Args:
        names: model types, of ``resolve_model.architectures()``.
        tp: ranks for each.
        timeout_s: for each; one that takes longer is "broken".
        known: rows of an earlier run.
        found: called with every new row.
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
    """Check one architecture on this rank; returns fields of a Row. Rank 0's are kept."""
    from transformers import AutoConfig

    options = TensorParallelConfig(tp_size=tp, quiet=True)
    model_class = class_named(class_name)
    try:
        config = config_for(model_class, AutoConfig.for_model(model_type))
    except Exception as failure:
        return {"sentence": f"transformers cannot build its default config: {short(failure)}"}
    found, options = check_on_ranks(model_class, config, options, ParallelMesh.create(tp))
    row = {name: getattr(found, name) for name in ("verdict", "sentence", "errors", "worst", "unreached", "precision")}
    row |= {"fraction": found.fraction, "measured_on": "small copy"}
    if dist.get_rank() == 0:
        row |= _full_size(model_class, config, options)
    return row


def _full_size(model_class: type[nn.Module], config: Any, options: TensorParallelConfig) -> dict[str, Any]:
    """Measure the default config; its completed copy if it cannot be built."""
    note = ""
    for measured_on in ("default config", "completed config"):
        try:
            full = full_model(on_meta(model_class, config), options)
        except Exception as failure:
            note = note or f"its default config cannot be built: {short(failure)}"
            config = copy.deepcopy(config)
            for part in configs_in(config):
                complete_config(part)
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
    """Write rows as JSON, atomically."""
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


_WORDS = {"equal": "pass", "differs": "WRONG", "broken": "fails", "refused": "refused", "untested": "not tested"}


def markdown(rows: Iterable[Row]) -> str:
    """Write the coverage table as a Markdown document."""
    rows = sorted(rows, key=lambda row: row.model_type)
    if not rows:
        return "# Coverage\n\nNo architecture was checked.\n"
    tp, counts = rows[0].tp, collections.Counter(row.verdict for row in rows)
    many = sum(row.counts for row in rows)
    days = sorted({row.date for row in rows})
    limits = ", ".join(f"{name} {limit:.0e}" for name, limit in LIMITS.items())
    words = ", ".join(f"{counts[verdict]} {word}" for verdict, word in _WORDS.items() if counts[verdict])
    head = f"""# Coverage

Generated by `tp-plugin coverage --tp {tp}` with {environment()}, {" to ".join(dict.fromkeys((days[0], days[-1])))}.
Do not edit.

Every architecture of transformers that has a language-model, sequence-classification or vision-language head, with its
class's default config. A copy of that config runs in fp32 in one process and on {tp} ranks. It has the same head counts
and flags, but few layers, narrow widths and a vocabulary that no degree divides. The relative errors of the loss, the
logits and the worst parameter's gradient must be within {limits}.
"Largest rank" is the share of the parameters that the fullest rank holds under the plan of the default config. It is
"(completed)" if the defaults lack fields that every checkpoint has, "(small copy)" if neither can be built.

**{len(rows)} architectures: {words}. {many} pass with at most {COUNTS_UP_TO:.0%} of their parameters on the
largest rank.**

"""
    lines = [
        "| model type | class | rules | largest rank | loss | logits | worst gradient | | replicated, or why not |"
    ]
    lines += ["| --- " * 9 + "|"]
    lines += [_line(row) for row in rows]
    return head + "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    figures = [f"{row.errors[name]:.0e}" if name in row.errors else "" for name in LIMITS]
    share = f"{row.fraction:.1%}" if row.source or row.verdict == "equal" else ""
    if share and row.measured_on != "default config":
        share += f" ({row.measured_on.removesuffix(' config')})"
    cells = (row.model_type, row.class_name, row.source, share, *figures, _WORDS[row.verdict], _remarks(row))
    return "| " + " | ".join(cells) + " |"


def _remarks(row: Row) -> str:
    if row.verdict != "equal":
        return _cell(row.sentence)
    large: dict[str, list[str]] = {}
    for name, share in row.replicated.items():
        large.setdefault(row.reasons[name], []).append(f"`{name}` {share:.1%}")
    said = [
        f"{reason}: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        for reason, names in large.items()
    ]
    if row.unreached:
        shown = ", ".join(f"`{name}`" for name in row.unreached[:3]) + (" ..." if len(row.unreached) > 3 else "")
        said += [f"not reached by the inputs: {shown}"]
    if row.precision == "float64":
        said += ["compared in float64, float32 amplifies rounding beyond the limits"]
    if row.note:
        said += [_cell(row.note)]
    return "; ".join(said)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
