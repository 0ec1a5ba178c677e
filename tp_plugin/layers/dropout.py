"""Dropout inside sharded regions: random numbers derived from the default generator.

Masks of a sharded tensor must differ between the ranks of a TP group; masks of a replicated one must agree. A second
random stream would do, but ``torch.utils.checkpoint`` does not save it, so recomputation would draw other masks.
Instead, entering a region seeds the default generator from its own state and the TP rank. Leaving it restores the
state, advanced by one draw. Ranks in step before a region are in step after it, and activation checkpointing, which
restores the default generator, draws the same masks again.
"""

from __future__ import annotations

import re

import torch
from torch import nn

_MASK = (1 << 64) - 1
_STARTED: list[DerivedRandomness] = []


class DerivedRandomness:
    """Random numbers of one region: started by its columns, stopped by its row.

    Does nothing in a block without active dropout. There is no host synchronisation: seed and offset of a CUDA
    generator are on the host.
    """

    def __init__(self, parent: nn.Module, tp_rank: int) -> None:
        self.tp_rank = tp_rank
        self.parent = parent
        self.rates = [(m, name) for m in parent.modules() for name, value in vars(m).items() if _is_rate(name, value)]
        self.dropouts = [child for child in parent.modules() if isinstance(child, nn.modules.dropout._DropoutNd)]
        self._resume: tuple[torch.Generator, torch.Tensor] | None = None

    def active(self) -> bool:
        """True if a forward of the block now would draw random numbers."""
        if not self.parent.training:
            return False
        return any(m.training and getattr(m, name) > 0 for m, name in self.rates) or any(
            d.p > 0 and d.training for d in self.dropouts
        )

    def start(self, device: torch.device) -> None:
        """Seed the default generator of ``device`` for this rank, unless it is seeded already."""
        if self._resume is not None or not self.active():
            return
        generator = default_generator(device)
        seed = _draw(generator)
        self._resume = generator, generator.get_state()
        _STARTED.append(self)
        generator.manual_seed(_mix(seed + _mix(self.tp_rank + 1)) >> 1)

    def stop(self) -> None:
        """Restore the state that the default generator had on entry."""
        if self._resume is not None:
            generator, state = self._resume
            self._resume = None
            _STARTED.remove(self)
            generator.set_state(state)


def draw_by_rank(dropout: nn.Module, tp_rank: int) -> None:
    """Use a different mask per rank in ``dropout``, which gets a sharded tensor outside of any region."""
    random = DerivedRandomness(dropout, tp_rank)

    @torch.compiler.disable
    def start(_dropout: nn.Module, args: tuple) -> None:
        random.start(args[0].device)

    @torch.compiler.disable
    def stop(*_: object) -> None:
        random.stop()

    dropout.register_forward_pre_hook(start)
    dropout.register_forward_hook(stop, always_call=True)


def draw_in_common(dropout: nn.Module) -> None:
    """Use one mask on all ranks in ``dropout``, which gets a replicated tensor inside a region.

    During its forward the default generator has the common state; then the region is seeded again.
    """
    paused: list[DerivedRandomness] = []

    @torch.compiler.disable
    def pause(_dropout: nn.Module, _args: tuple) -> None:
        paused[:] = _STARTED
        for random in reversed(paused):
            random.stop()

    @torch.compiler.disable
    def resume(_dropout: nn.Module, args: tuple, _output: object) -> None:
        for random in paused:
            random.start(args[0].device)
        paused.clear()

    dropout.register_forward_pre_hook(pause)
    dropout.register_forward_hook(resume, always_call=True)


def draws_random_numbers(model: nn.Module) -> bool:
    """True if a forward now, of the model or any block in it, would use dropout or jitter a router's input."""
    return model.training and (has_dropout(model) or _has_noise(model))


def has_dropout(model: nn.Module) -> bool:
    """True if a training forward, of the model or any block in it, would use dropout."""
    return any(
        (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        or any(_is_rate(name, value) and value > 0 for name, value in vars(module).items())
        for module in model.modules()
    )


def _has_noise(model: nn.Module) -> bool:
    """True if an attribute is a router's jitter or the probability of masking inputs."""
    return any(
        re.search("jitter|noise|mask_.*prob", name) and isinstance(value, int | float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
    )


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout on ``device`` draws from."""
    if device.type == "cpu":
        return torch.default_generator
    generators = torch.get_device_module(device).default_generators
    return generators[device.index if device.index is not None else torch.get_device_module(device).current_device()]


def _draw(generator: torch.Generator) -> int:
    """A number that depends on the generator's state only; advances the generator."""
    if generator.device.type == "cpu":
        return int(torch.randint(0, 1 << 62, (1,), generator=generator).item())
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # counts in fours (Philox)
    return generator.initial_seed() ^ _mix(offset)


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): neighbouring inputs give unrelated outputs."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _is_rate(name: str, value: object) -> bool:
    return "drop" in name and isinstance(value, int | float) and not isinstance(value, bool)
