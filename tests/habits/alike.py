"""Two reports of the same training, compared: what differs, by name."""

from __future__ import annotations

import math
from typing import Any

import torch

LIMIT = 1e-4  # of a tensor's norm; numbers by a tenth of it


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(expected.keys() | found.keys())
        return [text for key in keys for text in differences(expected.get(key), found.get(key), f"{where}.{key}")]
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [text for index, (one, other) in pairs for text in differences(one, other, f"{where}[{index}]")]
    if torch.is_tensor(expected) and torch.is_tensor(found) and expected.shape == found.shape:
        error = float((expected - found).norm() / expected.norm())
        return [] if error <= LIMIT else [f"{where}: differs by {error:.1e} of its norm"]
    if isinstance(expected, float) and isinstance(found, float):
        alike = math.isclose(expected, found, rel_tol=LIMIT / 10, abs_tol=1e-9)
        return [] if alike else [f"{where}: {found}, not {expected}"]
    return [] if type(expected) is type(found) and expected == found else [f"{where}: {found!r}, not {expected!r}"]
