"""Matrix products with a result wider than their half-precision factors, and the sums of a head's gradients."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from tp_plugin.collectives import all_reduce_
from tp_plugin.loss.parts import Head, HeadGrads, Wanted, wide_of

PURPOSE = "loss"  # of the collectives, for their counters


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, spare_bytes: int) -> torch.Tensor:
    """``a @ b.T`` [m, n] for a [m, k] and b [n, k] of one dtype.

    Args:
        dtype: of the result: that of the factors, or a wider one in which the sums are accumulated and kept. Without
            such an operation on the device b is widened block by block within ``spare_bytes`` (or a row at a time).
    """
    if dtype == a.dtype:
        return torch.mm(a, b.t())
    if _multiplies_wider(a.device, a.dtype):
        return torch.mm(a, b.t(), out_dtype=dtype)
    a = a.to(dtype)
    out = a.new_empty(a.shape[0], b.shape[0])
    height = max(1, spare_bytes // (max(1, b.shape[1]) * dtype.itemsize))
    for start in range(0, b.shape[0], height):
        part = slice(start, start + height)
        torch.mm(a, b[part].to(dtype).t(), out=out[:, part])
    return out


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, spare_bytes: int) -> None:
    """``total += a.T @ b`` for a [k, m], b [k, n] of one dtype and a total [m, n] of that or a wider one.

    A product for a wider total is not rounded before it is added. Without such an operation on the device the factors
    are widened, block by block within ``spare_bytes`` (or a row at a time).
    """
    wide = total.dtype
    if wide == b.dtype:
        total.addmm_(a.t(), b)
    elif _adds_wider(total.device, b.dtype):
        torch.addmm(total, a.t(), b, out_dtype=wide, out=total)
    elif a.shape[0] <= a.shape[1]:  # few rows to add up: all of b at once, the total in blocks
        b = b.to(wide)
        height = max(1, spare_bytes // (max(1, a.shape[0]) * wide.itemsize))
        for start in range(0, total.shape[0], height):
            part = slice(start, start + height)
            total[part].addmm_(a[:, part].to(wide).t(), b)
    else:
        depth = max(1, spare_bytes // ((a.shape[1] + b.shape[1]) * wide.itemsize))
        for start in range(0, a.shape[0], depth):
            part = slice(start, start + depth)
            total.addmm_(a[part].to(wide).t(), b[part].to(wide))


@functools.cache
def _multiplies_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """True if ``torch.mm`` keeps a half-precision product in float32 here; tried once a device."""
    if device.type != "cuda":
        return False
    a = torch.ones(16, 16, dtype=dtype, device=device)
    a[:, 0] = 2.0**-5  # 15 + 2^-10 does not fit into float16's 11 bits
    try:
        out = torch.mm(a, a.t(), out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((out == 15.0 + 2.0**-10).all())


@functools.cache
def _adds_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """True if ``torch.addmm`` adds a half-precision product to a float32 total here; tried once a device."""
    if device.type != "cuda":
        return False
    a, b = (torch.ones(16, 16, dtype=dtype, device=device) for _ in range(2))
    total = torch.full((16, 16), 2.0**-7, device=device)  # 16 + 2^-7 does not fit into float16's 11 bits
    try:
        torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 16.0 + 2.0**-7).all())


class RowSums:
    """Gradients over chunks of full rows: each has its rows of the hidden gradient and adds to the weight gradient.

    The weight gradient is float32 (float64) when there is more than one chunk. So it is for float16, in which a sum
    over tokens can overflow before it is divided by their number. The hidden gradient is float32 when it is a sum
    over ranks: rounded parts would have 1.3 times the error of one process at tp 2, and 1.5 times at tp 4. Its
    all-reduces run until :meth:`finish`.
    """

    def __init__(self, head: Head, wanted: Wanted, single: bool, spare_bytes: int) -> None:
        """``single``: there is one chunk only. ``spare_bytes``: working memory of one product."""
        self.head, self.wanted, self.spare_bytes = head, wanted, spare_bytes
        self.hidden = self.weight = self.bias = None
        if wanted.hidden:
            dtype = head.hidden.dtype if head.vocab.group is None else head.wide
            self.hidden = torch.empty(head.hidden.shape, dtype=dtype, device=head.hidden.device)
        if wanted.weight and (head.hidden.shape[0] == 0 or not single or head.hidden.dtype == torch.float16):
            self.weight = torch.zeros_like(head.weight, dtype=head.wide, memory_format=torch.contiguous_format)
        if wanted.bias:
            self.bias = torch.zeros(head.weight.shape[0], dtype=head.wide, device=head.hidden.device)
        self.pending: list[dist.Work] = []

    def add(self, rows: slice, d: torch.Tensor) -> None:
        """Add the gradient [c, v] of the raw products of ``rows``."""
        if self.hidden is not None:
            part = self.hidden[rows]
            if part.dtype == d.dtype:
                torch.mm(d, self.head.weight, out=part)
            else:
                add_product_(part.zero_(), d.t(), self.head.weight, self.spare_bytes)
            work = all_reduce_(part, self.head.vocab.group, purpose=PURPOSE, async_op=True)
            if work is not None:
                self.pending.append(work)
        if self.wanted.weight:
            if self.weight is None:
                self.weight = torch.mm(d.t(), self.head.hidden[rows])
            else:
                add_product_(self.weight, d, self.head.hidden[rows], self.spare_bytes)
        if self.bias is not None:
            self.bias.add_(d.sum(0, dtype=self.bias.dtype))

    def finish(self, scale: torch.Tensor) -> HeadGrads:
        """Wait for the all-reduces."""
        for work in self.pending:
            work.wait()
        return HeadGrads(self.hidden, self.weight, self.bias, scale)


class TileSums:
    """Gradients over tiles of rows and columns, column after column, without an accumulator as large as the weight.

    A column's weight gradient is complete after its last rows. The hidden gradient, float32 (float64), is
    complete with the last column and reduced over the group once.
    """

    def __init__(self, head: Head, wanted: Wanted, spare_bytes: int) -> None:
        self.head, self.wanted, self.spare_bytes = head, wanted, spare_bytes
        device, wide = head.hidden.device, head.wide
        self.hidden = torch.zeros(head.hidden.shape, dtype=wide, device=device) if wanted.hidden else None
        narrow = head.weight.dtype != torch.float16  # a sum over tokens can overflow that
        kept = head.weight.dtype if narrow else wide
        self.weight = torch.zeros(head.weight.shape, dtype=kept, device=device) if wanted.weight else None
        self.bias = torch.zeros(head.weight.shape[0], dtype=wide, device=device) if wanted.bias else None
        self.column: torch.Tensor | None = None

    def add(self, rows: slice, columns: slice, d: torch.Tensor) -> None:
        """Add the gradient [c, b] of the raw products of ``rows`` and ``columns``."""
        head, every = self.head, rows.stop - rows.start == self.head.hidden.shape[0]
        if self.hidden is not None:
            add_product_(self.hidden[rows], d.t(), head.weight[columns], self.spare_bytes)
        if self.weight is not None:
            if self.weight.dtype == wide_of(d.dtype):
                add_product_(self.weight[columns], d, head.hidden[rows], self.spare_bytes)
            elif every:
                torch.mm(d.t(), head.hidden, out=self.weight[columns])
            else:
                if rows.start == 0:
                    self.column = torch.zeros(d.shape[1], head.hidden.shape[1], dtype=head.wide, device=d.device)
                assert self.column is not None
                add_product_(self.column, d, head.hidden[rows], self.spare_bytes)
                if rows.stop == head.hidden.shape[0]:
                    self.weight[columns], self.column = self.column, None
        if self.bias is not None:
            self.bias[columns] += d.sum(0, dtype=self.bias.dtype)

    def finish(self, scale: torch.Tensor) -> HeadGrads:
        """Reduce the hidden gradient over the group."""
        if self.hidden is not None:
            all_reduce_(self.hidden, self.head.vocab.group, purpose=PURPOSE)
        return HeadGrads(self.hidden, self.weight, self.bias, scale)
