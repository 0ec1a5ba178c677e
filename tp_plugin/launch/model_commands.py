"""Commands of ``tp-plugin`` on models: ``plan``, ``check`` and ``coverage``."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError

EXIT = {"equal": 0, "differs": 1, "broken": 1, "refused": 3, "untested": 4}
"""Exit code by verdict; 2 is argparse's own, for a command line it cannot read."""


def _options(options: argparse.Namespace) -> TensorParallelConfig:
    """The user's config with the command line's degree, after the user's own modules are imported."""
    for name in options.imports:
        _import(name)
    config = TensorParallelConfig()
    if options.deepspeed_config is not None:
        config = TensorParallelConfig.from_deepspeed(options.deepspeed_config)
        if options.tp is None and config.tp_size == 1 and not getattr(options, "as_rules", None):
            raise TensorParallelError(
                f"{str(options.deepspeed_config)!r} has no tensor_parallel.autotp_size above 1; add it, or --tp N."
            )
    return dataclasses.replace(config, tp_size=options.tp or config.tp_size, quiet=True)


def _import(name: str) -> None:
    sys.path.insert(0, str(Path(name).resolve().parent if name.endswith(".py") else Path.cwd()))
    try:
        importlib.import_module(Path(name).stem if name.endswith(".py") else name)
    except ImportError as failure:
        raise TensorParallelError(f"cannot import {name!r}: {failure}; give a Python file or a module.") from failure


def plan(options: argparse.Namespace) -> int:
    """Print the plan of the full-size model, or its rules."""
    from tp_plugin.model_check.check import on_meta
    from tp_plugin.model_check.resolve_model import resolve_model
    from tp_plugin.plans import plan_as

    config = _options(options)
    subject = resolve_model(options.model, trust_remote_code=options.trust_remote_code)
    model = on_meta(subject.model_class, subject.config)
    if options.as_rules:
        print(_rules(model, config, options.as_rules))
        return 0
    found = plan_as(model, config)
    print(found.describe())
    if found.inferred():
        print("  inferred rules are tried on a small copy before a model is sharded: tp-plugin check does so now")
    return 0


def _rules(model: Any, config: TensorParallelConfig, kind: str) -> str:
    from tp_plugin.plans.resolve import matched_rules
    from tp_plugin.plans.suggest import as_json, as_python, skeleton

    modules = dict(model.named_modules())
    _, matched, _ = matched_rules(model, modules, config.plan, inferring=config.infer != "off")
    rules = skeleton(modules, matched, family=kind == "python")
    return as_json(rules) if kind == "json" else as_python(rules, model.config.model_type)


def check(options: argparse.Namespace) -> int:
    """Print the plan, the shares of the ranks, and the errors of the small copy."""
    from tp_plugin.model_check.check import check as examine
    from tp_plugin.model_check.parity import LIMITS
    from tp_plugin.model_check.resolve_model import resolve_model

    started = time.monotonic()
    config = _options(options)
    subject = resolve_model(options.model, trust_remote_code=options.trust_remote_code)
    found = examine(subject.model_class, subject.config, config)
    print(f"{subject.model_class.__name__} of {subject.name}")
    if found.full.plan:
        print(found.full.plan)
        print(
            f"  {found.full.parameters:,} parameters; the fullest rank holds {found.full.fraction:.1%}, "
            f"the mean rank {found.full.mean:.1%}"
        )
    for name, error in found.parity.errors.items():
        where = f" ({found.parity.worst})" if name == "gradient" and found.parity.worst else ""
        print(f"  {name:<8} relative error {error:.1e}, limit {LIMITS[name]:.0e}{where}")
    if found.parity.errors:
        print(
            f"  compared: {', '.join(found.parity.errors)} of the model's own loss on a small copy; a trainer's "
            "loss is compared before its first step"
        )
    for name in found.parity.unreached:
        print(f"  not reached by the trial's inputs: {name}")
    verdict = "refused" if found.full.refused and found.parity.verdict == "equal" else found.parity.verdict
    reason = found.full.refused if verdict == "refused" and found.full.refused else found.parity.sentence
    if found.remedy:
        print(f"  passes with these rules of your own: {json.dumps({'plan': found.remedy})}")
    print(f"{verdict.upper()}{': ' + reason if reason else ''} ({time.monotonic() - started:.0f} s)")
    return EXIT[verdict]


def coverage(options: argparse.Namespace) -> int:
    """Check architectures, print each result as it comes, write the table."""
    from tp_plugin.model_check import coverage as cover
    from tp_plugin.model_check.coverage import markdown

    names = cover.chosen(options.only)
    if not names:
        raise TensorParallelError(f"no model type of the installed transformers matches {options.only!r}.")
    record = options.output.with_suffix(".json") if options.output else None
    rows = cover.load(record, options.tp) if record and not options.fresh else {}
    todo = [name for name in names if name not in rows]
    print(f"{len(names)} architectures, {len(names) - len(todo)} known already", flush=True)
    done = 0

    def found(row: cover.Row) -> None:
        nonlocal done
        done += 1
        rows[row.model_type] = row
        if record:
            cover.save(record, rows.values())
        share = f"{row.fraction:.0%}" if row.source else ""
        print(f"[{done}/{len(todo)}] {row.model_type} {row.verdict} {share} {row.sentence[:160]}".rstrip(), flush=True)

    cover.cover(todo, options.tp, jobs=options.jobs, timeout_s=options.timeout, found=found)
    if options.output:
        options.output.write_text(markdown(rows.values()))
    verdicts = collections.Counter(rows[name].verdict for name in names)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return 1 if any(rows[name].verdict in ("differs", "broken") for name in names) else 0
