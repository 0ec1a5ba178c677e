"""Compare a small model sharded over a tensor-parallel group with itself unsharded: loss, logits, every gradient.

Every rank computes the reference for itself, so only the logits are gathered. Where the two differ, both run again with
every module's output recorded, to name the module that differs first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, together
from tp_plugin.layers.generators import same_draws, seed_all
from tp_plugin.layout import ShardLayout
from tp_plugin.lazy import materialise_outputs
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.model_check.tiny_model import Recorded, TinyModel, recorded_outputs
from tp_plugin.peers import arrive, prepare
from tp_plugin.plans import Plan
from tp_plugin.plans import plan as p
from tp_plugin.sharding import Sharding, shard_in_place

LIMITS = {"loss": 1e-5, "logits": 1e-4, "gradient": 1e-4}
"""Largest relative errors that still count as equal in fp32."""
ROUNDING = 100.0
"""Errors up to so many limits may be rounding, which some models amplify; float64 decides."""
FLOOR = 1e-3
"""A gradient's error is relative to its own norm, or to this share of the norm of all gradients if that is more. Some
gradients are zero but for rounding: a key bias moves all scores of a softmax alike."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One forward and backward: the loss, the full logits, gradients by parameter name (None: got none)."""

    loss: float
    logits: torch.Tensor | None
    gradients: dict[str, torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Parity:
    """Result of a comparison.

    Attributes:
        verdict: "equal", "differs", "refused" (the plan), "broken" (the sharded model raised) or "untested" (the
            unsharded model cannot be run, or not twice alike).
        errors: largest relative error by quantity, of :data:`LIMITS`; empty where nothing was compared.
        sentence: why it is not "equal": the first module that differs, and the rule that placed it.
        worst: the parameter whose gradient differs most.
        fraction: parameters of the fullest rank over all, of the small model.
        unreached: folded names of placed modules that the inputs did not reach; their rules are untested.
        precision: of the comparison; "float64" where float32 amplified rounding beyond the limits.
    """

    verdict: str
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    sentence: str = ""
    worst: str = ""
    fraction: float = 1.0
    unreached: list[str] = dataclasses.field(default_factory=list)
    precision: str = "float32"


def run(model: nn.Module, inputs: dict[str, Any]) -> Run:
    """Run forward with labels, and backward. A model without a loss gets the mean of its squared logits."""
    model.zero_grad(set_to_none=True)
    seed_all(11)  # a layer skipped at random by one rank would leave the other ranks waiting
    output = model(**inputs)
    logits = _logits(output)
    loss = getattr(output, "loss", None)
    if loss is None:
        if logits is None:
            raise TensorParallelError(f"{type(model).__name__} returns neither a loss nor logits.")
        loss = logits.float().square().mean()
    with torch.no_grad():
        full = None if logits is None else materialise_outputs(logits).detach()
    loss.sum().backward()
    return Run(
        float(loss.detach().sum()),
        full,
        {name: None if q.grad is None else q.grad.detach().clone() for name, q in model.named_parameters()},
    )


def reproducible(tiny: TinyModel) -> str | None:
    """Run the unsharded model twice; return why it cannot be a reference, or None."""
    model = tiny.build()
    inputs = tiny.inputs(model)
    first = run(model, inputs)
    if not math.isfinite(first.loss):
        return f"its loss is {first.loss} unsharded"
    if not any(g is not None and bool(g.any()) for g in first.gradients.values()):
        return "no parameter gets a gradient unsharded"
    again = run(model, inputs)
    errors, worst = compare(first, again, {}, 0)
    if excess(errors):
        return f"two unsharded runs differ ({worst or 'loss'}: {max(errors.values()):.1e}); its forward draws at random"
    return None


def compare_sharded(tiny: TinyModel, config: TensorParallelConfig, mesh: ParallelMesh) -> Parity:
    """Compare ``tiny`` sharded over ``mesh`` with itself unsharded; a collective call over the world.

    Every rank returns the same. A rank that raises in the sharded run alone raises here, see
    :func:`tp_plugin.peers.arrive`.
    """
    device = comm_device(mesh.tp_group)
    prepare(mesh)
    with same_draws(device):
        found = _examine(tiny, config, mesh, device)
        if found.verdict == "differs" and all(found.errors[n] <= ROUNDING * limit for n, limit in LIMITS.items()):
            precise = _examine(dataclasses.replace(tiny, dtype=torch.float64), config, mesh, device)
            if precise.verdict == "equal":  # it was rounding: a wrong sum would not go away
                return dataclasses.replace(precise, precision="float64")
        return found


def _examine(tiny: TinyModel, config: TensorParallelConfig, mesh: ParallelMesh, device: torch.device) -> Parity:
    reference_model = tiny.build().to(device)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tiny.inputs(reference_model).items()}
    reference = run(reference_model, inputs)
    model = tiny.build().to(device)
    try:
        record = shard_in_place(model, dataclasses.replace(config, quiet=True), mesh)
    except TensorParallelError as refused:
        return Parity("refused", sentence=str(refused))
    ours, sentence = _run_together(model, inputs, record)
    if ours is None:
        return Parity("broken", sentence=sentence, fraction=record.fraction())
    unreached = _unreached(reference, record.plan)
    errors, worst = _worst_of_all(*compare(reference, ours, record.layouts, mesh.tp_rank), mesh)
    if not excess(errors):
        return Parity("equal", errors, worst=worst, fraction=record.fraction(), unreached=unreached)
    where = first_difference(reference_model, model, inputs, record)
    what = ", ".join(f"{name} {errors[name]:.1e}" for name in excess(errors))
    culprit = f"the output of {blame(where, record.plan)} differs first" if where is not None else "every output agrees"
    gradient = _first_gradient(reference_model, reference, ours, record)
    if where is None and gradient:
        culprit += f", the gradient of {blame(gradient, record.plan)} differs first in backward"
    sentence = f"sharded and unsharded differ ({what}): {culprit}"
    return Parity("differs", errors, sentence, worst, record.fraction(), unreached)


def _run_together(model: nn.Module, inputs: dict[str, Any], record: Sharding) -> tuple[Run | None, str]:
    """Run the sharded model; None on every rank, and where it failed, if any rank failed."""
    found, failure, sentence = None, None, None
    try:
        found = run(model, inputs)
    except Exception as raised:
        failure = raised
        text = f"{type(raised).__name__}: {' '.join(str(raised).splitlines()[:1])}"[:300]
        sentence = f"in {blame(_module_of(raised.__traceback__, model), record.plan)} sharded: {text}"
    arrive(failure, "the trial of the rules")
    said = together(sentence)
    return (None if said else found), said


def _unreached(reference: Run, plan: Plan) -> list[str]:
    reached = {name.rpartition(".")[0] for name, gradient in reference.gradients.items() if gradient is not None}
    with_parameters = {name.rpartition(".")[0] for name in reference.gradients}
    return p.fold_all(name for name in plan.placements if name in with_parameters - reached)


def excess(errors: dict[str, float]) -> list[str]:
    """Name the quantities beyond their limit; NaN is beyond."""
    return [name for name, error in errors.items() if not error <= LIMITS[name]]


def compare(
    reference: Run, ours: Run, layouts: Mapping[str, ShardLayout], tp_rank: int
) -> tuple[dict[str, float], str]:
    """Return relative errors of this rank, and the name of the parameter whose gradient differs most."""
    errors = {"loss": abs(ours.loss - reference.loss) / max(abs(reference.loss), 1e-12), "logits": 0.0, "gradient": 0.0}
    if reference.logits is not None:
        errors["logits"] = _relative(ours.logits, reference.logits, 1e-12)
    worst = ""
    for name, error in gradient_errors(reference, ours, layouts, tp_rank).items():
        if not error <= errors["gradient"]:
            errors["gradient"], worst = error, name
    return errors, worst


def gradient_errors(reference: Run, ours: Run, layouts: Mapping[str, ShardLayout], tp_rank: int) -> dict[str, float]:
    """Relative error of every parameter's gradient, each shard against the same shard of the reference."""
    norms = [float(gradient.double().norm()) for gradient in reference.gradients.values() if gradient is not None]
    floor = FLOOR * math.sqrt(sum(norm * norm for norm in norms))
    found = {}
    for name, expected in reference.gradients.items():
        got, layout = ours.gradients[name], layouts.get(name)
        if expected is None:
            found[name] = 0.0 if got is None or not bool(got.any()) else math.inf
            continue
        wanted = expected if layout is None else layout.shard(expected, tp_rank)
        found[name] = _relative(torch.zeros_like(wanted) if got is None else got, wanted, floor)
    return found


def first_difference(reference: nn.Module, model: nn.Module, inputs: dict[str, Any], record: Sharding) -> str | None:
    """Name the first module, in the order they finish, whose output on any rank is not that of the unsharded model."""
    expected, got = _outputs(reference, inputs), _outputs(model, inputs)

    def same(name: str, ours: torch.Tensor, tensor: torch.Tensor) -> bool:
        placement = record.plan.placements.get(name)
        if placement is not None and placement.style == p.COLUMN and tensor.shape != ours.shape:
            layout = placement.layouts.get("weight")
            if placement.outputs is not None or layout is None or layout.dim is None:
                return True
            if tensor.shape[-1] == layout.shape[layout.dim]:
                tensor = layout.along(tensor.dim() - 1, tensor.shape).shard(tensor, record.mesh.tp_rank)
        return tensor.shape != ours.shape or _relative(ours, tensor, 1e-12) <= LIMITS["logits"]

    name = first_apart(got, expected, same)
    mine = None if name is None else (list(expected).index(name), name)
    found: list[Any] = [mine] * record.mesh.tp_size
    dist.all_gather_object(found, mine, group=record.mesh.tp_group)
    return min((f for f in found if f is not None), default=(0, None))[1]


def first_apart(
    ours: Mapping[str, Recorded], expected: Mapping[str, Recorded], same: Callable[[str, Recorded, Recorded], bool]
) -> str | None:
    """Name the first module of ``expected`` for which ``same(name, ours, expected)`` is False; None if there is none.

    Modules that are missing in ``ours`` are passed over.
    """
    return next((name for name, value in expected.items() if name in ours and not same(name, ours[name], value)), None)


def blame(name: str, plan: Plan) -> str:
    """Describe a module by the rule that placed it, or by the rules inside it."""
    placement = plan.placements.get(name)
    if placement is not None:
        return f"{name!r} ({placement.style}, {placement.source})"
    inside = [pl for other, pl in plan.placements.items() if other.startswith(f"{name}.")]
    if not name or not inside or len(inside) > 8:
        return f"{name or 'the model'!r}"
    return f"{name!r} (" + ", ".join(f"{q.name.removeprefix(f'{name}.')}: {q.style}, {q.source}" for q in inside) + ")"


def _logits(output: Any) -> torch.Tensor | None:
    for key in ("logits", "prediction_logits", "lm_logits"):
        if isinstance(found := getattr(output, key, None), torch.Tensor):
            return found
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
    return next((v for v in values if isinstance(v, torch.Tensor) and v.dim() > 1 and v.is_floating_point()), None)


def _relative(ours: torch.Tensor | None, reference: torch.Tensor, floor: float) -> float:
    if ours is None or ours.shape != reference.shape:
        return math.inf
    ours, reference = ours.double(), reference.double()
    same = ours == reference  # infinities of masks too
    size = reference.masked_fill(same & reference.isinf(), 0).norm().clamp_min(floor or 1e-12)
    return float((ours - reference).masked_fill(same, 0).norm() / size)


def _worst_of_all(errors: dict[str, float], worst: str, mesh: ParallelMesh) -> tuple[dict[str, float], str]:
    found: list[Any] = [(errors, worst)] * mesh.tp_size
    dist.all_gather_object(found, (errors, worst), group=mesh.tp_group)
    total = {name: max((e[name] for e, _ in found), key=_nan_last) for name in errors}
    return total, max(found, key=lambda item: _nan_last(item[0]["gradient"]))[1]


def _nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    with recorded_outputs(model, lambda tensor: tensor.detach().clone()) as found:
        run(model, inputs)
    return found


def _first_gradient(model: nn.Module, reference: Run, ours: Run, record: Sharding) -> str | None:
    """The module of the last parameter, in model order, whose gradient differs: the first in backward."""
    errors = gradient_errors(reference, ours, record.layouts, record.mesh.tp_rank)
    wrong = [name for name, _ in model.named_parameters() if not errors[name] <= LIMITS["gradient"]]
    return wrong[-1].rpartition(".")[0] if wrong else None


def _module_of(trace: TracebackType | None, model: nn.Module) -> str:
    """Name of the innermost module that was running when the exception was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found) or found
        trace = trace.tb_next
    return found
