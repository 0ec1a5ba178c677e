"""Apply each mutant to a copy of the working tree and see its tests fail.

    python -m tests.mutants [TEXT ...]      only mutants whose name contains one of the texts

First the named tests run on the unchanged copy, where all must pass. Exit code 1 says that a mutant survived, that
tests failed without one, or that a mutant broke the import of a module (which proves nothing).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.mutants.table import ROOT, Mutant, all_mutants

TIMEOUT_S = 600
VERDICTS = {0: "survived", 1: "caught"}  # pytest's exit codes; all others prove nothing


def copy_tree(target: Path) -> None:
    """Copy what git tracks, as it lies in the working tree, and files not yet added."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: tuple[str, ...], timeout_s: float | None) -> tuple[int, str]:
    """Run tests in ``tree``; return pytest's exit code (a time-out counts as a failed test) and its last lines."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"no end within {timeout_s} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])


def verdict_on(mutant: Mutant, tree: Path) -> tuple[str, str]:
    """Break one file, run the tests, mend the file; return the verdict and the last lines."""
    path = tree / mutant.file
    before = path.read_text()
    path.write_text(mutant.applied_to(before))
    try:
        code, tail = run_tests(tree, mutant.tests, TIMEOUT_S)
    finally:
        path.write_text(before)
    return VERDICTS.get(code, f"proves nothing (pytest exit code {code})"), tail


def main(texts: list[str]) -> int:
    """Run the chosen mutants; print a line for each that was not caught and a summary."""
    chosen = [m for m in all_mutants() if not texts or any(text in m.id for text in texts)]
    if not chosen:
        print(f"no mutant's name contains {' or '.join(texts)}")
        return 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tp_plugin-mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        named = tuple(sorted({test for mutant in chosen for test in mutant.tests}))
        print(f"{len(chosen)} mutants; first their {len(named)} tests without any", flush=True)
        code, tail = run_tests(tree, named, None)
        if code:
            print(f"tests fail on the unchanged tree:\n{tail}")
            return 1
        missed = 0
        for mutant in tqdm(chosen, unit="mutant"):
            verdict, tail = verdict_on(mutant, tree)
            if verdict != "caught":
                missed += 1
                tqdm.write(f"{mutant.id}: {verdict}\n{tail}")
    print(f"{len(chosen) - missed} of {len(chosen)} caught in {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
