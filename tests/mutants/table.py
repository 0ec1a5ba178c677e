"""Read the tables of mutants."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One breakage.

    Attributes:
        room: name of the table it is listed in.
        name: the wrong behaviour, in a few words.
        file: path of the file it changes, relative to the repository.
        find: text that occurs exactly once in that file.
        replace: text that takes its place.
        tests: node ids of which at least one must fail.
    """

    room: str
    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    @property
    def id(self) -> str:
        """A unique name for the command line."""
        return f"{self.room}: {self.name}"

    def applied_to(self, text: str) -> str:
        """Return the file's text with the breakage.

        Raises:
            ValueError: ``find`` does not occur exactly once.
        """
        count = text.count(self.find)
        if count != 1:
            raise ValueError(f"{self.id}: {self.find!r} occurs {count} times in {self.file}; update the table")
        return text.replace(self.find, self.replace)


def all_mutants() -> list[Mutant]:
    """Read every table, in alphabetical order of rooms."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutant"]:
            found.append(Mutant(room=path.stem, **entry | {"tests": tuple(entry["tests"])}))
    return found
