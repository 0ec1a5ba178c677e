"""Build the sets of versions that people have and run the sample in each: make test-versions.

python -m tests.versions [SET ...] [--envs DIR] [--results DIR] [--fresh] [--workers N] [--build-only]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.ranks import ROOT
from tests.versions import environment, run
from tests.versions.sets import HERE, sets

RESULTS = HERE / "results.json"
ENVIRONMENTS = Path(os.environ.get("TP_VERSION_ENVS", ROOT / ".versions"))


def main(arguments: list[str] | None = None) -> int:
    """Run the sets; exit code 1 where one of them fails, 3 where one cannot be installed and no other fails.

    A refusal by a feature is no failure.
    """
    known = sets()
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(known)}; all without one")
    parser.add_argument("--envs", type=Path, default=ENVIRONMENTS, help="where environments are built and kept")
    parser.add_argument("--results", type=Path, help="where a JSON file a set is written; DIR of --envs without it")
    parser.add_argument("--fresh", action="store_true", help="build environments that are there again")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest")
    parser.add_argument("--record", action="store_true", help="put the results into tests/versions/results.json")
    parser.add_argument("--build-only", action="store_true", help="run nothing in them")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sets if name not in known]
    if unknown:
        parser.error(f"there is no set {unknown[0]!r}")
    results = options.results or options.envs
    results.mkdir(parents=True, exist_ok=True)
    codes = [0]
    for name in options.sets or known:
        code = 3
        try:
            python, code = environment.build(known[name], options.envs, options.fresh), 1
            if options.build_only:
                continue
            found = run.run(known[name], python, options.workers)
        except (RuntimeError, subprocess.TimeoutExpired) as failure:  # no installation, no doctor, no pytest
            found = {"set": name, "of": known[name].of, "right": False, "error": str(failure)}
        (results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(*summary(found), sep="\n", flush=True)
        if options.record and "error" not in found:
            record(found)
        codes.append(0 if found["right"] else code)
    return 1 if 1 in codes else max(codes)


def record(found: dict) -> None:
    """Keep what docs/upstream.md shows of a set; the other sets' results stay."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[found["set"]] = {
        "versions": found["versions"],
        "parts": {part["part"]: part["refused"] or _counts(part) for part in found["parts"]},
        "seconds": found["seconds"],
    }
    RESULTS.write_text(json.dumps({name: kept[name] for name in sets() if name in kept}, indent=1) + "\n")


def summary(found: dict) -> list[str]:
    """A few lines about a set."""
    if "error" in found:
        return [f"{found['set']}: {found['error']}"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"{found['set']} ({versions}): {'right' if found['right'] else 'WRONG'} after {found['seconds']} s"]
    for part in found["parts"]:
        lines.append(f"  {part['part']}: {part['refused'] or _counts(part)}")
        lines += [f"    {test}: {text.splitlines()[0] if text else ''}" for test, text in part["failures"].items()]
    return lines


def _counts(part: dict) -> str:
    return ", ".join(f"{part[name]} {name}" for name in ("passed", "failed", "skipped") if part[name])


if __name__ == "__main__":
    sys.exit(main())
