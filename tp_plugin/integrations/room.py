"""Room: the integration of one library, whose parts are imported, checked and installed one by one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from tp_plugin.integrations.contract import NameMoved, Patches
from tp_plugin.integrations.features import Feature, broken_features, forget_moved, note_moved
from tp_plugin.integrations.import_hooks import AfterImport, Lay
from tp_plugin.integrations.upstream import Upstream, refuse_at
from tp_plugin.sharding.state import sharded_models


class Room:
    """The parts of one library's integration: modules of ours with :class:`Upstream` declarations.

    A part whose import fails since a name is gone breaks its feature, as a declared name that has moved does. Features
    that are not broken are installed. Functions of a broken one raise while a model is sharded.

    Args:
        package: our package of the library.
        parts: the modules in it (or full names), in the order of installing, with the feature that their import makes
            possible.
        waits: the library is slow to import or optional. A part then has ``MODULE``, a module of the library, and
            ``declare(module)``, which returns its :class:`Upstream`; it is installed when that module is imported. The
            part of a program names its owners as text, and is declared with None where it is not installed.
        otherwise: called where a feature is broken, after the others are installed.
    """

    def __init__(
        self,
        package: str,
        parts: Mapping[str, Feature],
        *,
        waits: bool = False,
        otherwise: Callable[[], None] | None = None,
    ) -> None:
        self._package, self._features, self._waits, self._otherwise = package, dict(parts), waits, otherwise
        self.library = next(iter(self._features.values())).library
        self._patches = Patches()
        self._waiting: AfterImport | None = None

    # ---- installing -------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Patch the library; calling it again does nothing, nor does a library that is not installed.

        Raises:
            TensorParallelError: a name has moved without which nothing works.
        """
        if self._patches or self._waiting or find_spec(self.library) is None:
            return
        forget_moved(self.library)
        if self._waits:
            self._waiting = AfterImport({module: self._late(part) for module, part in self._awaited().items()})
            self._waiting.install()
            return
        self._install([one for part in self._parts() for one in declared_in(part)])

    def uninstall(self) -> None:
        """Remove the patches. Models that are sharded stay sharded."""
        if self._waiting is not None:
            self._waiting.uninstall()
            self._waiting = None
        self._patches.undo()

    def features(self) -> list[Feature]:
        """The features that parts are made for; a part may have declarations for further ones."""
        return list(dict.fromkeys(self._features.values()))

    def declarations(self) -> list[Upstream]:
        """Every declaration, for documentation and checks; imports the library if it is installed."""
        if self._waits:
            bring = importlib.import_module if find_spec(self.library) is not None else lambda name: None
            return [self._part(part).declare(bring(name)) for name, part in self._awaited().items()]
        return [one for part in self._parts() for one in declared_in(part)]

    def check(self) -> None:
        """Note the features of which a name has moved; imports the library. What is installed was checked."""
        if find_spec(self.library) is None or self._patches:
            return
        forget_moved(self.library)
        for one in self.declarations():
            _note(one)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _parts(self) -> list[ModuleType]:
        found = []
        for name, feature in self._features.items():
            try:
                found.append(self._part(name))
            except (ImportError, AttributeError, NameMoved) as failure:
                note_moved(feature, f"{failure} (an import of tp_plugin)")
        return found

    def _part(self, name: str) -> Any:
        return importlib.import_module(name if name.startswith("tp_plugin.") else f"{self._package}.{name}")

    def _awaited(self) -> dict[str, str]:
        return {self._part(name).MODULE: name for name in self._features}

    def _late(self, part: str) -> Lay:
        def lay(module: ModuleType) -> None:
            self._install([self._part(part).declare(module)])

        return lay

    def _install(self, declarations: list[Upstream]) -> None:
        for one in declarations:
            _note(one)
        broken = {feature for feature in broken_features() if feature.library == self.library}
        for feature in broken:
            if feature.needed:
                feature.require()
        for one in declarations:
            if one.feature not in broken:
                one.install(self._patches)
            else:
                one.refuse(self._patches, in_use)
        for feature in broken:
            for place in feature.places:
                module, _, path = place.partition(":")
                owner, _, name = path.rpartition(".")
                refuse_at(self._patches, feature, f"{module}:{owner}" if owner else module, name, in_use)
        if broken and self._otherwise is not None:
            self._otherwise()


def _note(upstream: Upstream) -> None:
    for reason in upstream.moved():
        note_moved(upstream.feature, reason)


def declared_in(part: ModuleType) -> Iterator[Upstream]:
    """The declarations of a module of ours."""
    return (value for value in vars(part).values() if isinstance(value, Upstream))


def in_use() -> bool:
    """Return True if a model of this process is sharded, or its launch asks for tensor parallelism."""
    if sharded_models():
        return True
    try:
        from tp_plugin.integrations.accelerate.degree import tp_size, tp_size_of_launch
    except ImportError:  # of a name of accelerate's that is gone
        return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return max(tp_size(), tp_size_of_launch()) > 1
