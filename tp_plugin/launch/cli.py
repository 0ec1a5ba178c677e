"""``tp-plugin``: what would be sharded, whether it is right, and for which architectures.

tp-plugin plan llama --tp 2
tp-plugin check meta-llama/Llama-3.1-8B --tp 4
tp-plugin coverage --tp 2 --output docs/coverage.md
tp-plugin inspect out/checkpoint-500
tp-plugin export out/checkpoint-500 model
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError

EXIT = {"equal": 0, "differs": 1, "broken": 1, "refused": 3, "untested": 4}
"""Exit code by verdict; 2 is argparse's own, for a command line it cannot read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # ranks are forked, and a fork cannot use its parent's threads
    from transformers import logging

    logging.set_verbosity_error()
    try:
        return options.command(options)
    except TensorParallelError as refused:
        print(f"tp-plugin: {refused}", file=sys.stderr)
        return EXIT["refused"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tp-plugin", description="Tensor parallelism for HuggingFace models.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, function, summary in (
        ("plan", plan, "print how a model would be sharded; needs no weights"),
        ("check", check, "run a small copy of a model sharded and unsharded on this CPU and compare"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("model", help="a hub id, a local directory, a model type (llama) or a class (LlamaConfig)")
        command.add_argument("--tp", type=_degree, required=True, metavar="N", help="ranks to shard over")
        command.add_argument("--trust-remote-code", action="store_true", help="run the code of the checkpoint")
        command.set_defaults(command=function)
    summary = "tell an engine checkpoint's shape, step, sizes and health"
    command = commands.add_parser("inspect", help=summary, description=summary)
    command.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder with some: the latest of them")
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(command=inspect)
    summary = "write an engine checkpoint as an HF directory, in this process, without a GPU"
    command = commands.add_parser("export", help=summary, description=summary)
    command.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder with some: the latest of them")
    command.add_argument("out", type=Path, help="the directory to write; a model in it is replaced")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (5GB)")
    command.set_defaults(command=export)
    command = commands.add_parser("coverage", help="check every architecture of transformers, write a table")
    command.add_argument("--tp", type=_degree, default=2, metavar="N", help="ranks to shard over (2)")
    command.add_argument("--only", metavar="PATTERNS", help="model types, comma-separated, * allowed")
    command.add_argument("--jobs", type=int, default=2, metavar="N", help="architectures at a time (2)")
    command.add_argument("--output", type=Path, metavar="FILE", help="a .md; a .json is kept beside it (none)")
    command.add_argument("--timeout", type=float, default=120.0, metavar="S", help="for each architecture (120)")
    command.add_argument("--fresh", action="store_true", help="forget what the .json has of these versions")
    command.set_defaults(command=coverage)
    return parser


def _degree(text: str) -> int:
    degree = int(text)
    if degree < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return degree


def plan(options: argparse.Namespace) -> int:
    """Print the plan of the full-size model."""
    from tp_plugin.plans import plan_for
    from tp_plugin.verify.check import on_meta
    from tp_plugin.verify.subject import subject_of

    subject = subject_of(options.model, trust_remote_code=options.trust_remote_code)
    found = plan_for(on_meta(subject.model_class, subject.config), options.tp)
    print(found.describe())
    if found.inferred():
        print("  inferred rules are tried on a small copy before a model is sharded: tp-plugin check does so now")
    return 0


def check(options: argparse.Namespace) -> int:
    """Print the plan, what a rank would hold, and how the small copy's figures compare."""
    from tp_plugin.verify.check import check as examine
    from tp_plugin.verify.parity import LIMITS
    from tp_plugin.verify.subject import subject_of

    started = time.monotonic()
    subject = subject_of(options.model, trust_remote_code=options.trust_remote_code)
    found = examine(subject.model_class, subject.config, TensorParallelConfig(tp_size=options.tp, quiet=True))
    print(f"{subject.model_class.__name__} of {subject.name}")
    if found.whole.plan:
        print(found.whole.plan)
        print(
            f"  {found.whole.parameters:,} parameters; the fullest rank holds {found.whole.fraction:.1%}, "
            f"the mean rank {found.whole.mean:.1%}"
        )
    for name, error in found.parity.errors.items():
        where = f" ({found.parity.worst})" if name == "gradient" and found.parity.worst else ""
        print(f"  {name:<8} relative error {error:.1e}, limit {LIMITS[name]:.0e}{where}")
    for name in found.parity.unreached:
        print(f"  not reached by the trial's inputs: {name}")
    verdict = "refused" if found.whole.refused and found.parity.verdict == "equal" else found.parity.verdict
    reason = found.whole.refused if verdict == "refused" and found.whole.refused else found.parity.sentence
    if found.remedy:
        print(f"  passes with these rules of your own: {json.dumps({'plan': found.remedy})}")
    print(f"{verdict.upper()}{': ' + reason if reason else ''} ({time.monotonic() - started:.0f} s)")
    return EXIT[verdict]


def coverage(options: argparse.Namespace) -> int:
    """Examine architectures, print each as it is found, write the table."""
    from tp_plugin.verify import coverage as cover
    from tp_plugin.verify.table import markdown

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


def inspect(options: argparse.Namespace) -> int:
    """Print what a checkpoint is; exit code 1 where it is damaged."""
    from tp_plugin.launch.checkpoint import described, report

    said = report(options.checkpoint)
    print(json.dumps(said, indent=2) if options.json else described(said))
    return 0 if said["whole"] else EXIT["broken"]


def export(options: argparse.Namespace) -> int:
    """Examine a checkpoint and write it as an HF directory."""
    from tp_plugin.integrations.transformers import offline
    from tp_plugin.launch.checkpoint import found
    from tp_plugin.weights.whole import examine

    checkpoint = found(options.checkpoint)
    damage = examine(checkpoint)
    if damage:
        raise TensorParallelError(damage)
    names = offline.export(checkpoint, options.out, max_shard_size=options.max_shard_size)
    print(f"{checkpoint} written as {options.out}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
