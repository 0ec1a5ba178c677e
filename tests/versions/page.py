"""Write docs/upstream.md: every name of other libraries that tp_plugin relies on, and the versions that tests ran with.

python -m tests.versions.page [FILE]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tp_plugin
from tests.support.ranks import ROOT
from tests.versions.__main__ import RESULTS
from tests.versions.minors import TABLE
from tests.versions.sets import sample, sets
from tp_plugin.integrations.features import Feature
from tp_plugin.integrations.rooms import ROOMS
from tp_plugin.integrations.upstream import Name
from tp_plugin.integrations.versions import TESTED

PAGE = ROOT / "docs" / "upstream.md"
HEAD = """# Names of other libraries

Written by `python -m tests.versions.page`; a test compares it with the code.

tp-plugin replaces functions of the libraries it plugs into, and reads some of their private names. Each is declared
once, in `tp_plugin/integrations/`, for a feature. `register()` checks that every name is there and takes the parameters
listed. One that has moved costs its feature alone, which is refused in one sentence where it is used; without a needed
feature, `register()` refuses. `tp-plugin doctor` says what holds in an environment. A replaced function is the original
where nothing is sharded, and `unregister()` puts all of them back.
"""


COMING = """## What comes

Read in public pull requests on 2026-11-29; nothing of it was run.

- DeepSpeed's AutoTP has a vocabulary-parallel head since #8309 and its tied embedding in #8582, with a loss of Liger
  in #8540. It does in the same slot what tp-plugin does, and is off unless `vocab_parallel_lm_head` is set. tp-plugin
  takes the key where it says what the plan does, and refuses it where it does not.
- AutoTP's universal checkpoints across degrees (#8185) are records on its own layers. Checkpoints of tp-plugin load at
  any shape by themselves.
- transformers takes `tp_plan` and `tp_size` out of `from_pretrained` (#47353); `distributed_config` remains. tp-plugin
  reads plans of models, never `transformers.distributed`, and takes all three where they ask for the engine's degree.
"""


def text() -> str:
    """The page as the code is now; imports every library."""
    tp_plugin.unregister()
    return "\n".join([HEAD, *_versions(), *_sets(), *_minors(), COMING, *_libraries()]).rstrip() + "\n"


def _versions() -> Iterator[str]:
    yield "## Versions that tests ran with\n"
    yield "| library | versions |\n|---|---|"
    for library, versions in TESTED.items():
        yield f"| {library} | {', '.join(versions)} |"
    yield ""


def _sets() -> Iterator[str]:
    """A column for each set of tests/versions/sets.toml that has results, a row for each part of the sample."""
    results = json.loads(RESULTS.read_text())
    known = sets()
    yield "## Sets of versions that people have\n"
    yield "`make test-versions` builds each and runs the doctor and a sample of tests in it.\n"
    yield "| set | whose | " + " | ".join(TESTED) + " | Python | seconds |\n|" + "---|" * (len(TESTED) + 4)
    for name, found in results.items():
        versions = found["versions"]
        row = [name, known[name].of, *(versions[library] for library in TESTED), versions["python"], found["seconds"]]
        yield "| " + " | ".join(map(str, row)) + " |"
    yield "\n| part | " + " | ".join(results) + " |\n|---|" + "---|" * len(results)
    reasons: list[str] = []
    for part in sample():
        row = [_result(found["parts"].get(part.name, "not run"), reasons) for found in results.values()]
        yield f"| {part.name} | " + " | ".join(row) + " |"
    yield ""
    yield from (f"{number}. {reason}." for number, reason in enumerate((one.rstrip(".") for one in reasons), 1))
    yield ""


def _result(text: str, reasons: list[str]) -> str:
    if re.fullmatch(r"(\d+ \w+(, )?)+|not run", text):
        return text
    if text not in reasons:
        reasons.append(text)
    return f"none ({reasons.index(text) + 1})"


def _minors() -> Iterator[str]:
    """Every minor between the sets, one library varied at a time: the features whose names have moved."""
    yield "## Every minor between them\n"
    yield "`make minors` checks the names alone, one library varied beside the pinned others.\n"
    yield "| library | all names hold | a feature is lost |\n|---|---|---|"
    for library, found in json.loads(TABLE.read_text()).items():
        whole = [version for version, lost in found.items() if not lost]
        rest = [f"{version}: {'; '.join(lost)}" for version, lost in found.items() if lost]
        yield f"| {library} | {', '.join(whole)} | {'<br>'.join(rest)} |"
    yield ""


def _libraries() -> Iterator[str]:
    for room in ROOMS:
        names: dict[Feature, list[Name]] = {}
        for one in room.declarations():
            names.setdefault(one.feature, []).extend(one.names)
        count = sum(map(len, names.values()))
        replaced = sum(name.make is not None for found in names.values() for name in found)
        yield f"## {room.library}: {count} names, {replaced} of them replaced\n"
        for feature, found in names.items():
            yield f"**{feature.name[0].upper()}{feature.name[1:]}**{' (needed)' if feature.needed else ''}\n"
            yield "| name | parameters | | reason |\n|---|---|---|---|"
            for name in sorted(found, key=lambda name: (name.where, name.name)):
                yield _row(name)
            if feature.instead:
                yield f"\nWithout it: {feature.instead}."
            yield ""


def _row(name: Name) -> str:
    takes = "" if name.parameters is None else f"`({', '.join(name.parameters)})`"
    older = "".join(f", or `({', '.join(parameters)})`" for parameters in name.older)
    since = f"; since {name.since}" if name.since else ""
    since += f"; before {name.until}" if name.until else ""
    use = "replaced" if name.make is not None else "used"
    return f"| `{name.where}.{name.name}` | {takes}{older} | {use}{since} | {name.why} |"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(text())
