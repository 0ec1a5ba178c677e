"""Run the programs that people fine-tune with by their own commands: make test-clients.

python -m tests.clients [PROGRAM ...] [--kinds KIND ...] [--envs DIR] [--runs DIR] [--record]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.clients import axolotl, llamafactory, run, swift
from tests.clients.program import Program
from tests.versions.__main__ import ENVIRONMENTS

RESULTS = Path(__file__).parent / "results.json"
PROGRAMS: dict[str, Program] = {
    "llamafactory": llamafactory.PROGRAM,
    "ms-swift": swift.PROGRAM,
    "axolotl": axolotl.PROGRAM,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the programs; exit code 1 where one that is sharded by tp_plugin is not equal to one process."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}; all without one")
    parser.add_argument("--kinds", nargs="*", default=[], help="what to train; everything without one")
    parser.add_argument("--envs", type=Path, default=ENVIRONMENTS, help="where environments are built and kept")
    parser.add_argument("--runs", type=Path, default=run.program_folder(), help="where outputs are left")
    parser.add_argument("--record", action="store_true", help="put the results into tests/clients/results.json")
    options = parser.parse_args(arguments)
    right = True
    for name in options.programs or PROGRAMS:
        if name not in PROGRAMS:
            parser.error(f"there is no program {name!r}")
        program = PROGRAMS[name]
        python = run.build(program, options.envs)
        found = run.run(program, python, (options.runs / name).absolute(), options.kinds)
        print(json.dumps({program.name: found}, indent=1), flush=True)
        if options.record:
            _record(program, found)
        right = right and all(_is_right(kind) for kind in found.values())
    return 0 if right else 1


def _is_right(kind: dict) -> bool:
    return all(case.get("right", False) for way, case in kind.items() if way.startswith("ours"))


def _record(program: Program, found: dict) -> None:
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[program.name] = kept.get(program.name, {}) | found
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
