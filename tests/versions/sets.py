"""Sets of versions that people have, and the sample of tests that runs in each."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

from tests.support.ranks import ROOT

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class VersionSet:
    """Libraries that somebody has installed together.

    Attributes:
        name: a word for the command line and the folder.
        of: whose it is.
        libraries: requirements of the libraries we plug into.
        torch: its requirement; "" is the one of constraints.txt.
        needs: the Python that their program asks for, "" if any does.
        lacks: parts of the sample that these libraries do not do without tp_plugin either, and why.
    """

    name: str
    of: str
    libraries: tuple[str, ...]
    torch: str = ""
    needs: str = ""
    lacks: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def torch_requirement(self) -> str:
        """The requirement of torch, which is installed first and alone."""
        return self.torch or next(line for line in _constraints() if line.startswith("torch=="))


@dataclasses.dataclass(frozen=True)
class Part:
    """Tests of the sample that show one use.

    Attributes:
        name: the use.
        tests: ids of pytest.
        needs: names in :mod:`tp_plugin.integrations.features`; where one is broken, the tests are not run.
    """

    name: str
    tests: tuple[str, ...]
    needs: tuple[str, ...] = ()


def sets() -> dict[str, VersionSet]:
    """The sets of sets.toml by name, in order of weight."""
    found = tomllib.loads((HERE / "sets.toml").read_text())["set"]
    made = [VersionSet(**{key: tuple(v) if isinstance(v, list) else v for key, v in one.items()}) for one in found]
    return {one.name: one for one in made}


def sample() -> tuple[Part, ...]:
    """The parts of sample.toml."""
    found = tomllib.loads((HERE / "sample.toml").read_text())["part"]
    return tuple(Part(one["name"], tuple(one["tests"]), tuple(one.get("needs", ()))) for one in found)


def _constraints() -> list[str]:
    return (ROOT / "constraints.txt").read_text().splitlines()
