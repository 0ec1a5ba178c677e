"""Write docs/clients.md: programs that people fine-tune with, by their own commands, against one process of theirs.

python -m tests.clients.page
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.clients.__main__ import PROGRAMS, RESULTS
from tests.clients.compare import LIMITS
from tests.clients.program import ROWS, STEPS
from tests.support.ranks import ROOT

PAGE = ROOT / "docs" / "clients.md"
HEAD = f"""# Programs that people fine-tune with

Written by `python -m tests.clients.page` from what `make test-clients` measured.

Each program was started by its own command with a recipe of ours ([recipes](../recipes/README.md)), made small: a Llama
of two layers with random weights, {STEPS} steps of {ROWS} rows, fp32, ZeRO-1, CPU ranks over gloo. The same program
trained in one process without DeepSpeed beside it. tp_plugin came in by `TP_PLUGIN=1`, which is what `tp-plugin exec`
sets. Figures are the largest relative difference of any step's loss, of any step's gradient norm, and of any tensor
saved at the end. They must be at most {LIMITS["loss"]:.0e}, {LIMITS["norm"]:.0e} and {LIMITS["weights"]:.0e}.

"An epoch, evaluated" trains on all rows once: as many steps, and the losses of every evaluation are among those
compared. "Resumed" trains to the end, then again from its own checkpoint half way. "Merged and asked": the
program's own command merges what was trained, and its own inference answers, both in one process without
tp_plugin. Merged tensors are among those compared, and the answers were the same words (axolotl draws them at
random).

DeepSpeed's own AutoTP ran at tp 2 by the same command without tp_plugin; on GPUs it may behave otherwise, and with a
vocabulary that the degree divides (this one has 131 words). Three gaps of a machine without GPUs were filled.
Accelerate knows no backend for DeepSpeed on a CPU: AutoTP was given gloo. There is no torchaudio for a CPU build of
torch: LLaMA-Factory imported an empty module. axolotl makes its device mesh of GPUs: it was made of the CPU.
"""
OTHERS = """## OpenRLHF

Its own command needs a GPU and was not run. Its calls, as version 0.11.2 makes them, are rebuilt in
`tests/integrations/deepspeed/test_openrlhf.py`: `tp_model_init`, groups of parameters, an optimizer of the config, a
factory of schedules, a `train_batch_size` that counts tensor-parallel ranks, log-probabilities gathered from float32
logits, `_consolidated_16bit_state_dict`, and `save_pretrained` by rank 0 alone. At tp 2, and at tp 2 x dp 2 with ZeRO 2
and 3, they equal one process (loss 1e-5, norm 1e-4, weights 1e-4).
"""
ALONE = {(one.name, kind): why for one in PROGRAMS.values() for kind, why in one.alone.items()}
COLUMNS = (
    "one process: first loss, norm",
    *(f"tp 2{dp}: loss, norm, weights" for dp in ("", " x dp 2")),
    "AutoTP, tp 2",
)


def text() -> str:
    """The page as results.json is now."""
    results = json.loads(RESULTS.read_text())
    return "\n".join([HEAD, *(line for name, found in results.items() for line in _program(name, found)), OTHERS])


def _program(name: str, found: dict[str, Any]) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}"
    for kind, ways in found.items():
        two = ways.get("ours-tp2xdp2") or {"error": f"not compared: {ALONE[name, kind]}"}
        cells = [_first(ways["one process"]), _apart(ways["ours-tp2xdp1"]), _apart(two)]
        yield f"| {kind} | {' | '.join(cells)} | {_autotp(ways['autotp-tp2xdp1'])} |"
    yield ""


def _first(found: dict[str, Any]) -> str:
    return found.get("error") or f"{found['first loss']:.4f}, {found['first norm']:.4f}"


def _apart(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    return ", ".join(f"{found[name]:.0e}" for name in LIMITS)


def _autotp(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"ends: {found['error'].split('. ')[0][:110]}"
    saved = "weights saved otherwise or not at all" if found["weights"] > 1 else f"weights {found['weights']:.0e}"
    return f"{_first(found)}; {saved}"


if __name__ == "__main__":
    PAGE.write_text(text())
