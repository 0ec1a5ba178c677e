"""Check the prose of the package: docstrings, comments and messages.

    python -m tests.prose [PATH ...]      files or folders; tp_plugin without any

Exit code 1 when a sentence breaks a rule of :mod:`tests.prose.rules`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.prose.rules import problems
from tests.prose.texts import texts_of

ROOT = Path(__file__).resolve().parents[2]


def main(names: list[str]) -> int:
    paths = [ROOT / name for name in names or ["tp_plugin"]]
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))
    count = 0
    for file in files:
        for text in texts_of(file.read_text()):
            for problem in problems(text):
                count += 1
                print(f"{file.relative_to(ROOT)}:{text.line}: {problem}")
    if count:
        print(f"{count} problems")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
