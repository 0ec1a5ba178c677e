"""``tp-plugin``: plans, checks and coverage of models; engine checkpoints; a look at the environment.

``tp-plugin plan llama --tp 2``
``tp-plugin plan llama --as-rules``
``tp-plugin check meta-llama/Llama-3.1-8B --tp 4``
``tp-plugin check path/to/model --deepspeed-config ds.json --import my_rules.py``
``tp-plugin coverage --tp 2 --output docs/coverage.md``
``tp-plugin inspect out/checkpoint-500``
``tp-plugin export out/checkpoint-500 model``
``tp-plugin convert-gguf path/to/folder model.gguf model``
``tp-plugin doctor``
``tp-plugin exec --degree 2 trl sft --config sft.yaml``
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import tp_plugin
from tp_plugin.errors import TensorParallelError
from tp_plugin.launch.model_commands import EXIT, check, coverage, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    needs_degree = options.command is check or (options.command is plan and not options.as_rules)
    if needs_degree and not (options.tp or options.deepspeed_config):
        parser.error("--tp N or --deepspeed-config FILE must say how many ranks there are")
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
    parser.add_argument("--version", action="version", version=f"tp-plugin {tp_plugin.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, function: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.set_defaults(command=function)
        return command

    planner = add("plan", plan, "print how a model would be sharded; needs no weights")
    planner.add_argument(
        "--as-rules",
        nargs="?",
        choices=("json", "python"),
        const="json",
        help="print rules to edit instead: the tp_plugin block of a DeepSpeed config (json), or a module that "
        "registers a family (python)",
    )
    checker = add("check", check, "run a small copy of a model sharded and unsharded on this CPU and compare them")
    for command in (planner, checker):
        command.add_argument("model", help="a hub id, a local directory, a model type (llama) or a class (LlamaConfig)")
        command.add_argument("--tp", type=_degree, metavar="N", help="ranks to shard over (as the config says)")
        command.add_argument(
            "--deepspeed-config",
            type=Path,
            metavar="FILE",
            help="a DeepSpeed config whose tensor_parallel.autotp_size and tp_plugin block count (none)",
        )
        command.add_argument(
            "--import",
            dest="imports",
            action="append",
            default=[],
            metavar="NAME",
            help="a Python file or module to import first, which registers models, families or packings; repeatable",
        )
        command.add_argument("--trust-remote-code", action="store_true", help="run the code of the checkpoint")
    inspector = add(
        "inspect", inspect, "print the topology, step and sizes of an engine checkpoint, and whether it is valid"
    )
    exporter = add("export", export, "write an engine checkpoint as an HF directory, in this process, without a GPU")
    for command in (inspector, exporter):
        command.add_argument(
            "checkpoint", type=Path, help="a checkpoint, or a folder of checkpoints: the latest counts"
        )
    inspector.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    exporter.add_argument("out", type=Path, help="the directory to write; a model in it is replaced")
    exporter.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="size limit of a weight file (5GB)")
    converter = add("convert-gguf", convert, "write a GGUF file as an HF directory of floating-point safetensors")
    converter.add_argument("model", help="the directory or hub id that has the file")
    converter.add_argument("file", help="the file's name in it")
    converter.add_argument("out", type=Path, help="the directory to write; a model in it is replaced")
    converter.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="(bfloat16)")
    covering = add("coverage", coverage, "check every architecture of the installed transformers and write a table")
    covering.add_argument("--tp", type=_degree, default=2, metavar="N", help="ranks to shard over (2)")
    covering.add_argument("--only", metavar="PATTERNS", help="model types, comma-separated, * allowed (all)")
    covering.add_argument("--jobs", type=int, default=2, metavar="N", help="architectures checked at a time (2)")
    covering.add_argument("--output", type=Path, metavar="FILE", help="a .md; a .json is kept beside it (none)")
    covering.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for an architecture (120)")
    covering.add_argument("--fresh", action="store_true", help="check again what the .json has of these versions")
    starter = add("exec", execute, "run a command with tp_plugin in every Python process that it starts")
    starter.add_argument(
        "--degree", type=_degree, metavar="N", help="ranks to shard over (as its DeepSpeed config says)"
    )
    starter.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments")
    doctor = add("doctor", examine, "report libraries, features, devices and variables, and try two ranks")
    doctor.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")
    doctor.add_argument("--no-test", action="store_true", help="leave out the trial on two ranks")
    return parser


def _degree(text: str) -> int:
    degree = int(text)
    if degree < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return degree


def inspect(options: argparse.Namespace) -> int:
    """Print a report on a checkpoint; exit code 1 where it is damaged."""
    from tp_plugin.launch.checkpoint import described, report

    said = report(options.checkpoint)
    print(json.dumps(said, indent=2) if options.json else described(said))
    return 0 if said["whole"] else EXIT["broken"]


def export(options: argparse.Namespace) -> int:
    """Validate a checkpoint and write it as an HF directory."""
    from tp_plugin.integrations.transformers import checkpoint_to_hf
    from tp_plugin.launch.checkpoint import found
    from tp_plugin.weights.fragments import damage_of

    checkpoint = found(options.checkpoint)
    damage = damage_of(checkpoint)
    if damage:
        raise TensorParallelError(damage)
    names = checkpoint_to_hf.export(checkpoint, options.out, max_shard_size=options.max_shard_size)
    print(f"{checkpoint} written as {options.out}: {', '.join(names)}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Write a GGUF file's weights and tokenizer so that training can load them."""
    from tp_plugin.integrations.transformers import gguf

    names = gguf.convert(options.model, options.file, options.out, getattr(torch, options.dtype))
    print(f"{options.file} written as {options.out}: {', '.join(names)}")
    return 0


def execute(options: argparse.Namespace) -> int:
    """Become the command, with ``TP_PLUGIN`` set."""
    from tp_plugin.launch.startup import execute as start

    return start(options.words, options.degree)


def examine(options: argparse.Namespace) -> int:
    """Print the report; exit code 3 where a feature is refused, 1 where the two ranks differ from one process."""
    from tp_plugin.launch import doctor

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs there
        lines = [*doctor.diagnose(), *([] if options.no_test else [doctor.self_test()])]
    width = max(len(line.subject) for line in lines)
    part = ""
    for line in lines:
        if options.json:
            print(json.dumps(dataclasses.asdict(line)))
            continue
        if line.part != part:
            part = line.part
            print(part)
        print(f"  {line.state:<4}  {line.subject:<{width}}  {line.text}")
    lost = {line.part for line in lines if line.state == "lost"}
    return EXIT["broken"] if "self-test" in lost else EXIT["refused"] if lost else 0


if __name__ == "__main__":
    sys.exit(main())
