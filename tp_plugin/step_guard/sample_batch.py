"""Take a small sample of a batch, with labels in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

ROWS, LENGTH = 2, 256  # of the batch, at most
MARGIN = 64  # positions after the first label, where there is room
SUPERVISED = ("labels", "shift_labels", "completion_mask", "assistant_masks")
TOKENWISE = {
    *SUPERVISED,
    *("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "seq_idx"),
}
"""Inputs whose second dimension counts tokens, so that they can be sliced there together."""
STARTS, LONGEST = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
"""Starts of sequences that are packed into one row, and the length of the longest."""


def sample_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Take some rows, and some positions of token-wise tensors; the whole batch if its structure is unknown.

    Each row has a label (or a completion) if any row of the batch has. Tensors of half as many rows belong to pairs,
    as reference log-probabilities of a DPO batch do.
    """
    if batch.keys() == {"args", "kwargs"}:
        return _sample_call(batch["args"], batch["kwargs"])
    packed = {name: batch[name] for name in STARTS if isinstance(batch.get(name), torch.Tensor)}
    tensors = {n: v for n, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() and n not in packed}
    rows = max((value.shape[0] for value in tensors.values()), default=0)
    halves = {n: v for n, v in tensors.items() if 2 * v.shape[0] == rows and rows > 2 and v.dim() == 1}
    per_row = {name: value for name, value in tensors.items() if name not in halves}
    if not per_row or any(value.shape[0] != rows for value in per_row.values()):
        return dict(batch)
    learned = _learned(per_row)
    kept = _rows(learned, rows)
    made = dict(batch) | {name: value[kept] for name, value in per_row.items()}
    made |= {name: value[: max(1, len(kept) // 2)] for name, value in halves.items()}
    start, stop = _window(None if learned is None else learned[kept], per_row, bool(packed))
    if start is None:
        return made
    made |= {name: made[name][:, start:stop] for name, value in per_row.items() if value.dim() > 1}
    for name, begins in packed.items():
        made[name] = begins.clamp(max=stop).unique_consecutive()
        longest = LONGEST[STARTS.index(name)]
        if longest in made:
            made[longest] = type(made[longest])(int(made[name].diff().max()))
    return made


def rows_of(batch: Mapping[str, Any]) -> int:
    """Count the rows of a batch, or of the call of a model; 0 where it has no tensors."""
    if batch.keys() == {"args", "kwargs"}:
        return max(rows_of(batch["kwargs"]), rows_of({str(place): value for place, value in enumerate(batch["args"])}))
    return max((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()), default=0)


def copied(batch: Any) -> Any:
    """Copy containers and tensors, for code that takes entries out of them or writes into them."""
    if isinstance(batch, Mapping):
        return {name: copied(value) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(copied(item) for item in batch)
    return batch.clone() if type(batch) is torch.Tensor else batch


def _sample_call(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Sample a model's call; the one positional argument that is known is the first of a transformers model."""
    if not args:
        return {"args": (), "kwargs": sample_batch(kwargs)}
    if len(args) > 1 or "input_ids" in kwargs or not isinstance(args[0], torch.Tensor) or args[0].dim() != 2:
        return {"args": args, "kwargs": dict(kwargs)}
    made = sample_batch({"input_ids": args[0], **kwargs})
    return {"args": (made.pop("input_ids"),), "kwargs": made}


def _learned(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Positions with a label ([rows, length], bool); None where the batch has none."""
    found = None
    for name in SUPERVISED:
        value = tensors.get(name)
        if value is None or value.dim() != 2:
            continue
        here = value != -100 if "labels" in name else value != 0
        found = here if found is None or found.shape != here.shape else found & here
    return found


def _rows(learned: torch.Tensor | None, rows: int) -> list[int]:
    """The first rows that have a label."""
    if learned is None:
        return list(range(min(ROWS, rows)))
    order = (~learned[:, 1:].any(1)).int().argsort(stable=True)
    return sorted(order[:ROWS].tolist())


def _window(
    learned: torch.Tensor | None, tensors: Mapping[str, torch.Tensor], packed: bool
) -> tuple[int | None, int | None]:
    """(start, stop) of the positions to keep, with labels of every row; (None, None) for all.

    Packed sequences keep their beginning, so more of them is kept where labels come late.
    """
    per_token = {name: value for name, value in tensors.items() if value.dim() > 1}
    lengths = {value.shape[1] for value in per_token.values()}
    if not per_token.keys() <= TOKENWISE or len(lengths) != 1:
        return None, None
    (length,) = lengths
    if length <= LENGTH:
        return None, None
    start, stop = 0, LENGTH
    if learned is not None and learned[:, 1:].any():
        firsts = [int(row[1:].int().argmax()) + 1 for row in learned if row[1:].any()]
        stop = max(LENGTH, min(length, max(firsts) + MARGIN))
        start = 0 if packed else max(0, min(stop - LENGTH, min(firsts) - 1))
    return start, stop


def is_plain(tree: Any) -> bool:
    """Return True if the inputs are tensors and plain values only; a forward would modify a cache."""
    if isinstance(tree, Mapping):
        return all(is_plain(value) for value in tree.values())
    if isinstance(tree, tuple | list):
        return all(is_plain(value) for value in tree)
    return tree is None or isinstance(tree, torch.Tensor | int | float | str)
