"""The rows' arithmetic as Triton kernels, whose only buffer is the logits in the dtype of the matrix product.

Two kernels, a program a row. The first reads the row once and stores its statistics. The second reads it again and
overwrites it with the gradient. The matrix products around them are the vendor's. The first is the online softmax of
Milakov and Gimelshein (https://arxiv.org/abs/1805.02867).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from triton import knobs

from tp_plugin.loss.block import NOTHING, Asked, Coefficients, Targets
from tp_plugin.loss.parts import Head, Transform
from tp_plugin.loss.products import product

INTERPRETED = bool(knobs.runtime.interpret)  # TRITON_INTERPRET=1: on the CPU, for tests


@triton.jit
def _logits(row_ptr, bias_ptr, columns, mask, inner, outer, HAS_BIAS: tl.constexpr, TANH: tl.constexpr):
    """Some logits of a row from the raw products, and the tanh of their soft cap."""
    x = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    x *= inner
    bent = x
    if TANH:
        bent = 2.0 * tl.sigmoid(2.0 * x) - 1.0
        x = bent * outer
    return tl.where(mask, x, float("-inf")), bent


@triton.jit
def statistics_kernel(
    products_ptr, bias_ptr, labels_ptr, soft_ptr, classes_ptr, transform_ptr, out_ptr, row_stride, soft_stride, rows,
    width, start,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, SOFT: tl.constexpr, CLASSES: tl.constexpr,
    LOGIT_SUM: tl.constexpr, ENTROPY: tl.constexpr, SQUARE_SUM: tl.constexpr, TOP_ID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store maximum, sum of exponentials and target logit of each row, and the optional statistics; [k, rows].

    Those are, in order: sum of logits, sum of e * log e, sum of e * e, sum of soft targets, column of the maximum.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr, soft_row_ptr = products_ptr + row * row_stride, soft_ptr + row * soft_stride
    inner, outer = tl.load(transform_ptr), tl.load(transform_ptr + 1)
    local = tl.load(labels_ptr + row) - start
    top = float("-inf")
    total, hit, plain, spread, squares, mass, best = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for offset in range(0, width, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        mask = columns < width
        x, _ = _logits(row_ptr, bias_ptr, columns, mask, inner, outer, HAS_BIAS, TANH)
        if TOP_ID:
            here, at = tl.max(x, 0, return_indices=True)
            best = tl.where(here > top, (offset + at).to(tl.float32), best)
        highest = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        apart = tl.where(top == float("-inf"), 0.0, top - shift)
        fade = tl.where(top == float("-inf"), 0.0, tl.exp(apart))
        e = tl.exp(x - shift)
        if ENTROPY:
            logs = tl.where(e > 0.0, x - shift, 0.0)
            spread = fade * (spread + apart * total) + tl.sum(e * logs, 0)
        if SQUARE_SUM:
            squares = squares * fade * fade + tl.sum(e * e, 0)
        total = total * fade + tl.sum(e, 0)
        if SOFT:
            t = tl.load(soft_row_ptr + columns, mask=mask, other=0.0)
            hit += tl.sum(tl.where(mask, x * t, 0.0), 0)
            mass += tl.sum(t, 0)
        else:
            hit += tl.sum(tl.where(mask & (columns == local), x, 0.0), 0)
        if LOGIT_SUM:
            w = 1.0
            if CLASSES:
                w = tl.load(classes_ptr + columns, mask=mask, other=0.0)
            plain += tl.sum(tl.where(mask, x * w, 0.0), 0)
        top = highest
    tl.store(out_ptr + row, top)
    tl.store(out_ptr + rows + row, total)
    tl.store(out_ptr + 2 * rows + row, hit)
    if LOGIT_SUM:
        tl.store(out_ptr + 3 * rows + row, plain)
    if ENTROPY:
        tl.store(out_ptr + (3 + LOGIT_SUM) * rows + row, spread)
    if SQUARE_SUM:
        tl.store(out_ptr + (3 + LOGIT_SUM + ENTROPY) * rows + row, squares)
    if SOFT:
        tl.store(out_ptr + (3 + LOGIT_SUM + ENTROPY + SQUARE_SUM) * rows + row, mass)
    if TOP_ID:
        tl.store(out_ptr + (3 + LOGIT_SUM + ENTROPY + SQUARE_SUM + SOFT) * rows + row, best)


@triton.jit
def gradient_kernel(
    products_ptr, bias_ptr, labels_ptr, soft_ptr, classes_ptr, transform_ptr, log_z_ptr, softmax_ptr, target_ptr,
    uniform_ptr, entropy_ptr, bent_ptr, row_stride, soft_stride, width, start,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, SOFT: tl.constexpr, CLASSES: tl.constexpr,
    UNIFORM: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite products with their gradient up to the transform's slope; coefficients as in ``Coefficients``."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, soft_row_ptr = products_ptr + row * row_stride, soft_ptr + row * soft_stride
    inner, outer = tl.load(transform_ptr), tl.load(transform_ptr + 1)
    local = tl.load(labels_ptr + row) - start
    log_z, by_softmax, by_target = tl.load(log_z_ptr + row), tl.load(softmax_ptr + row), tl.load(target_ptr + row)
    for offset in range(0, width, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        mask = columns < width
        x, bent = _logits(row_ptr, bias_ptr, columns, mask, inner, outer, HAS_BIAS, TANH)
        p = tl.exp(x - log_z)
        d = p * by_softmax
        if ENTROPY:  # dH/dx = -p (log p + H)
            logs = tl.where(p > 0.0, x - log_z, 0.0)
            d -= p * (logs + tl.load(entropy_ptr + row)) * tl.load(bent_ptr + row)
        if UNIFORM:
            w = 1.0
            if CLASSES:
                w = tl.load(classes_ptr + columns, mask=mask, other=0.0)
            d -= tl.load(uniform_ptr + row) * w
        if SOFT:
            d -= by_target * tl.load(soft_row_ptr + columns, mask=mask, other=0.0)
        else:
            d -= tl.where(columns == local, by_target, 0.0)
        if TANH:
            d *= 1.0 - bent * bent
        tl.store(row_ptr + columns, d.to(products_ptr.dtype.element_ty), mask=mask)


class TritonBlock:
    """The block for CUDA: float32 arithmetic on products in ``Head.kept``."""

    def __init__(
        self,
        products: torch.Tensor,
        bias: torch.Tensor | None,
        targets: Targets,
        dtype: torch.dtype,
        transform: Transform,
        asked: Asked,
    ) -> None:
        """``products``: [c, b] contiguous, which this block overwrites. The rest as for ``TorchBlock``."""
        self.products, self.bias, self.dtype = products, bias, dtype
        self.labels = torch.where(targets.valid, targets.labels, -1)  # below the ids of every shard
        self.soft = None if targets.soft is None else targets.soft.contiguous()
        self.classes = None if targets.classes is None else targets.classes.contiguous()
        self.start, self.tanh, self.asked = targets.start, transform.tanh, asked
        self.transform = torch.stack([_scalar(x, products.device) for x in (transform.inner, transform.outer)])

    @classmethod
    def of_head(cls, head: Head, hidden: torch.Tensor, targets: Targets, asked: Asked, spare_bytes: int) -> TritonBlock:
        """The logits of ``hidden`` [c, H] against the rows of ``head.weight``; ``spare_bytes`` as for ``product``."""
        products = product(hidden, head.weight, head.kept, spare_bytes)
        return cls(products, head.bias, targets, hidden.dtype, head.transform, asked)

    @staticmethod
    def bytes_per_logit(head: Head, asked: Asked) -> int:
        """Bytes of the one buffer, of its half-precision copy if it is wider, and of the soft targets."""
        kept, narrow = head.kept.itemsize, head.hidden.dtype.itemsize
        return kept + (narrow if narrow < kept else 0) + 4 * asked.mass

    def _flags(self) -> dict[str, bool]:
        soft, classes = self.soft is not None, self.classes is not None
        return {"HAS_BIAS": self.bias is not None, "TANH": self.tanh, "SOFT": soft, "CLASSES": classes}

    def _launch(self) -> dict[str, int]:
        block = min(4096, triton.next_power_of_2(max(16, self.products.shape[1])))
        return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}

    def statistics(self) -> torch.Tensor:
        rows, width = self.products.shape
        out = torch.empty(len(self.asked.names), rows, dtype=torch.float32, device=self.products.device)
        if not width:
            out.zero_()[0] = NOTHING
        elif rows:
            with _on(out.device):
                statistics_kernel[(rows,)](
                    self.products, _or(self.bias, out), self.labels, _or(self.soft, out), _or(self.classes, out),
                    self.transform, out, self.products.stride(0), width, rows, width, self.start,
                    **self._flags(), LOGIT_SUM=self.asked.logit_sum, ENTROPY=self.asked.entropy,
                    SQUARE_SUM=self.asked.square_sum, TOP_ID=self.asked.top_id, **self._launch(),
                )  # fmt: skip
            if self.asked.top_id:
                out[-1] += self.start
        return out

    def gradient_(self, log_z: torch.Tensor, entropy: torch.Tensor | None, by: Coefficients) -> torch.Tensor:
        rows, width = self.products.shape
        if rows and width:
            with _on(log_z.device):
                coefficients = (x if x is None else x.contiguous() for x in (by.uniform, entropy, by.entropy))
                uniform, level, bent = (_or(x, log_z) for x in coefficients)
                gradient_kernel[(rows,)](
                    self.products, _or(self.bias, log_z), self.labels, _or(self.soft, log_z), _or(self.classes, log_z),
                    self.transform, log_z.contiguous(), by.softmax.contiguous(), by.target.contiguous(), uniform, level,
                    bent, self.products.stride(0), width, width, self.start,
                    **self._flags(), UNIFORM=by.uniform is not None, ENTROPY=by.entropy is not None, **self._launch(),
                )  # fmt: skip
        return self.products.to(self.dtype)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make ``device`` the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """``tensor``, or ``other`` for a pointer that the kernel never reads."""
    return other if tensor is None else tensor


def _scalar(x: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """0-dim float32 on ``device``, filled there: copying a number from the host would wait for the device."""
    if isinstance(x, torch.Tensor):
        return x.to(device=device, dtype=torch.float32)
    return torch.full((), x, dtype=torch.float32, device=device)
