"""Batches of the fuzzer: shaped and labelled as a case says, the same in one process and on ranks."""

from __future__ import annotations

import torch

from tests.fuzz.case import Case
from tests.fuzz.families import CLASSES, FAMILIES, MASKED, SEQ2SEQ

Micro = dict[str, torch.Tensor]
EVALUATION = -1  # the step's number of the batch that is evaluated


def batches(case: Case, step: int) -> list[list[Micro]]:
    """[accumulation][dp rank] micro-batches of ``step``."""
    shape, labelled = case.batches[max(step, 0)]
    found = [[_micro(case, step, part * case.dp + rank, shape) for rank in range(case.dp)]
             for part in range(case.accumulation)]  # fmt: skip
    if FAMILIES[case.family].kind == CLASSES:
        return found
    every = [micro for part in found for micro in part]
    if labelled == "none":
        _ignore(every)
    elif labelled == "one":
        token = every[0]["labels"]
        word, place = int(every[0]["input_ids"].max()), _labelled_place(every[0])
        _ignore(every)
        token[place] = word
    elif labelled == "one rank":  # the last rank's, or the last micro-batch of a single one
        _ignore([part[-1] for part in found] if case.dp > 1 else found[-1] if case.accumulation > 1 else [])
    return found


def items_of(micros: list[list[Micro]], shifted: bool) -> int:
    """Labels that count, of all micro-batches of a step together."""
    return sum(int((m["labels"][:, 1:] if shifted else m["labels"]).ne(-100).sum()) for part in micros for m in part)


def _ignore(micros: list[Micro]) -> None:
    for micro in micros:
        micro["labels"].fill_(-100)


def _labelled_place(micro: Micro) -> tuple[int, int]:
    """The last one that is labelled, or the last token."""
    places = (micro["labels"] != -100).nonzero()
    return tuple(places[-1].tolist()) if len(places) else (0, -1)  # type: ignore[return-value]


def _micro(case: Case, step: int, index: int, shape: str) -> Micro:
    kind, vocab = FAMILIES[case.family].kind, case.options["vocab_size"]
    random = torch.Generator().manual_seed(1000 * case.seed + 50 * (step + 2) + index)
    rows, length = (1 if shape == "packed" else case.rows), case.length
    ids = torch.randint(3, vocab, (rows, length), generator=random)
    ignored = torch.rand(ids.shape, generator=random) < 0.3
    labels = ids.masked_fill(ignored, -100)
    if kind == CLASSES:
        labels = torch.randint(0, 3, (rows,), generator=random)
    elif kind == MASKED:
        ids = ids.masked_fill(~ignored, 2)
    else:
        labels[:, 0] = -100  # no token comes before it; counted alike by those who shift and those who do not
    found = {"input_ids": ids, "labels": labels}
    if shape == "packed":
        cuts = torch.randperm(length - 1, generator=random)[:2].add(1).sort().values.tolist()
        pieces = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        found["position_ids"] = torch.cat([torch.arange(n) for n in pieces])[None]
        labels[0, [0, *cuts]] = -100
    elif shape != "even":
        _pad(found, shape, random, ignored if kind == CLASSES else labels)
    if kind == SEQ2SEQ:
        found |= {"input_ids": ids[:, : max(2, length - 2)]}
        if "attention_mask" in found:
            found["attention_mask"] = found["attention_mask"][:, : max(2, length - 2)]
    return found


def _pad(found: Micro, side: str, random: torch.Generator, labels: torch.Tensor) -> None:
    """Cut rows to lengths of their own, at the left or at the right; one row keeps its length."""
    rows, length = found["input_ids"].shape
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        gone = int(torch.randint(0, length - 1, (), generator=random))
        mask[row, slice(0, gone) if side == "left" else slice(length - gone, length)] = 0
    found["input_ids"].masked_fill_(mask == 0, 0)
    if labels.shape == mask.shape and labels.dtype == torch.long:
        labels.masked_fill_(mask == 0, -100)
    found["attention_mask"] = mask
