"""The rooms of all libraries, in the order of installing, and the one line about versions without a test."""

from __future__ import annotations

from tp_plugin import log
from tp_plugin.integrations import (
    accelerate,
    axolotl,
    deepspeed,
    peft,
    pytorch,
    sentence_transformers,
    transformers,
    trl,
)
from tp_plugin.integrations.features import broken_features
from tp_plugin.integrations.versions import TESTED, untested
from tp_plugin.step_guard.guard import keep_guards_on

ROOMS = (
    *(pytorch.ROOM, deepspeed.ROOM, accelerate.ROOM, transformers.ROOM, peft.ROOM, trl.ROOM),
    *(sentence_transformers.ROOM, axolotl.ROOM),
)
_SAID: set[str] = set()


def announce() -> None:
    """Name versions that tests did not run with and features that are refused, once; the guard then stays on."""
    found = untested()
    if found:
        keep_guards_on()
        installed = ", ".join(
            f"{library} {version} (tested: {', '.join(TESTED[library])})" for library, version in found.items()
        )
        _say_once(
            f"no test ran with {installed}: the names that tp_plugin relies on are checked, and the guard of training "
            "steps stays on."
        )
    for feature in broken_features():
        _say_once(feature.broken or "")


def _say_once(text: str) -> None:
    if text not in _SAID:
        _SAID.add(text)
        log.warning(text)
