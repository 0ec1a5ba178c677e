"""One small model sharded over a tensor-parallel group against the same model whole: loss, logits, every gradient.

Every rank computes the truth for itself, so nothing need be gathered but the logits; where the two differ, both are run
again with every module's output recorded, to name the module that differs first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.lazy import VocabParallelLogits, materialise_outputs
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Plan
from tp_plugin.plans import plan as p
from tp_plugin.sharding import Sharding, shard_in_place
from tp_plugin.sharding.equal import comm_device
from tp_plugin.verify.specimen import Specimen

LIMITS = {"loss": 1e-5, "logits": 1e-4, "gradient": 1e-4}
"""Largest relative errors that still count as equal in fp32."""
ROUNDING = 100.0
"""Errors up to so many limits may be rounding, which some models amplify; whether they are, float64 shows."""
FLOOR = 1e-3
"""A gradient's error is measured against its own norm, or this share of the whole gradient's if that is more: some
gradients are zero but for rounding (a key bias moves all scores of a softmax alike)."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One forward and backward: the loss, the whole logits, gradients by parameter name (None: got none)."""

    loss: float
    logits: torch.Tensor | None
    gradients: dict[str, torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Parity:
    """What a comparison found.

    Attributes:
        verdict: "equal", "differs", "refused" (the plan), "broken" (the sharded model raised) or "untested" (the
            unsharded model cannot be run, or not twice alike).
        errors: largest relative error by quantity, of :data:`LIMITS`; empty where nothing was compared.
        sentence: why it is not "equal": what differs first, and which rule placed it.
        worst: the parameter whose gradient differs most.
        fraction: parameters of the fullest rank over all, of the small model.
        unreached: folded names of placed modules that the inputs did not reach, so that nothing is known of them.
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
    """Forward with labels and plain backward. Without a loss of its own the model gets a mean of squares."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    output = model(**inputs)
    logits = _logits(output)
    loss = getattr(output, "loss", None)
    if loss is None:
        if logits is None:
            raise TensorParallelError(f"{type(model).__name__} returns neither a loss nor logits.")
        loss = logits.float().square().mean()
    with torch.no_grad():
        whole = None if logits is None else materialise_outputs(logits).detach()
    loss.sum().backward()
    return Run(
        float(loss.detach().sum()),
        whole,
        {name: None if q.grad is None else q.grad.detach().clone() for name, q in model.named_parameters()},
    )


def reproducible(specimen: Specimen) -> str | None:
    """Why the model cannot be examined on its own, unsharded; None if it can."""
    model = specimen.build()
    inputs = specimen.inputs(model)
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


def examine(specimen: Specimen, config: TensorParallelConfig, mesh: ParallelMesh) -> Parity:
    """Compare ``specimen`` sharded over ``mesh`` with itself whole; a collective call over the world.

    Every rank returns the same. A rank that raises in the sharded run alone leaves its peers in a collective: callers
    give the group a time limit.
    """
    device = comm_device(mesh.tp_group)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        found = _examine(specimen, config, mesh, device)
        if found.verdict == "differs" and all(found.errors[n] <= ROUNDING * limit for n, limit in LIMITS.items()):
            precise = _examine(dataclasses.replace(specimen, dtype=torch.float64), config, mesh, device)
            if precise.verdict == "equal":  # it was rounding: a wrong sum would not go away
                return dataclasses.replace(precise, precision="float64")
        return found


def _examine(specimen: Specimen, config: TensorParallelConfig, mesh: ParallelMesh, device: torch.device) -> Parity:
    truth_model = specimen.build().to(device)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in specimen.inputs(truth_model).items()}
    truth = run(truth_model, inputs)
    model = specimen.build().to(device)
    try:
        record = shard_in_place(model, dataclasses.replace(config, quiet=True), mesh)
    except TensorParallelError as refused:
        return Parity("refused", sentence=str(refused))
    try:
        ours = run(model, inputs)
    except Exception as failure:
        raised_in = _module_of(failure.__traceback__, model)
        text = f"{type(failure).__name__}: {' '.join(str(failure).splitlines()[:1])}"[:300]
        sentence = f"in {blame(raised_in, record.plan)} sharded: {text}"
        return Parity("broken", sentence=sentence, fraction=record.fraction())
    unreached = _unreached(truth, record.plan)
    errors, worst = _worst_of_all(*compare(truth, ours, record.layouts, mesh.tp_rank), mesh)
    if not excess(errors):
        return Parity("equal", errors, worst=worst, fraction=record.fraction(), unreached=unreached)
    where = first_difference(truth_model, model, inputs, record)
    what = ", ".join(f"{name} {errors[name]:.1e}" for name in excess(errors))
    culprit = f"the output of {blame(where, record.plan)} differs first" if where is not None else "every output agrees"
    gradient = _first_gradient(truth_model, truth, ours, record)
    if where is None and gradient:
        culprit += f", the gradient of {blame(gradient, record.plan)} differs first in backward"
    sentence = f"sharded and unsharded differ ({what}): {culprit}"
    return Parity("differs", errors, sentence, worst, record.fraction(), unreached)


def _unreached(truth: Run, plan: Plan) -> list[str]:
    reached = {name.rpartition(".")[0] for name, gradient in truth.gradients.items() if gradient is not None}
    with_parameters = {name.rpartition(".")[0] for name in truth.gradients}
    return p.fold_all(name for name in plan.placements if name in with_parameters - reached)


def excess(errors: dict[str, float]) -> list[str]:
    """The quantities beyond their limit; NaN is beyond."""
    return [name for name, error in errors.items() if not error <= LIMITS[name]]


def compare(truth: Run, ours: Run, layouts: Mapping[str, ShardLayout], tp_rank: int) -> tuple[dict[str, float], str]:
    """Relative errors of this rank, and the name of the parameter whose gradient differs most."""
    errors = {"loss": abs(ours.loss - truth.loss) / max(abs(truth.loss), 1e-12), "logits": 0.0, "gradient": 0.0}
    if truth.logits is not None:
        errors["logits"] = _relative(ours.logits, truth.logits, 1e-12)
    total = math.sqrt(sum(float(g.double().square().sum()) for g in truth.gradients.values() if g is not None))
    worst = ""
    for name, error in gradient_errors(truth, ours, layouts, tp_rank, FLOOR * total).items():
        if not error <= errors["gradient"]:
            errors["gradient"], worst = error, name
    return errors, worst


def gradient_errors(
    truth: Run, ours: Run, layouts: Mapping[str, ShardLayout], tp_rank: int, floor: float
) -> dict[str, float]:
    """Relative error of every parameter's gradient, each shard against the same shard of the truth."""
    found = {}
    for name, expected in truth.gradients.items():
        got, layout = ours.gradients[name], layouts.get(name)
        if expected is None:
            found[name] = 0.0 if got is None or not bool(got.any()) else math.inf
            continue
        wanted = expected if layout is None else layout.shard(expected, tp_rank)
        found[name] = _relative(torch.zeros_like(wanted) if got is None else got, wanted, floor)
    return found


def first_difference(truth_model: nn.Module, model: nn.Module, inputs: dict[str, Any], record: Sharding) -> str | None:
    """The first module, in the order they finish, whose output on any rank is not that of the whole model."""
    expected, got = _outputs(truth_model, inputs), _outputs(model, inputs)
    mine = None
    for index, (name, tensor) in enumerate(expected.items()):
        other = got.get(name)
        if other is None:
            continue
        placement = record.plan.placements.get(name)
        if placement is not None and placement.style == p.COLUMN and tensor.shape != other.shape:
            layout = placement.layouts.get("weight")
            if placement.outputs is not None or layout is None or layout.dim is None:
                continue
            if tensor.shape[-1] == layout.shape[layout.dim]:
                tensor = layout.along(tensor.dim() - 1, tensor.shape).shard(tensor, record.mesh.tp_rank)
        if tensor.shape == other.shape and not _relative(other, tensor, 1e-12) <= LIMITS["logits"]:
            mine = index, name
            break
    found: list[Any] = [mine] * record.mesh.tp_size
    dist.all_gather_object(found, mine, group=record.mesh.tp_group)
    return min((f for f in found if f is not None), default=(0, None))[1]


def blame(name: str, plan: Plan) -> str:
    """A module with the rule that placed it, or the rules inside it."""
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


def _lazy(tensor: Any) -> bool:
    return isinstance(tensor, VocabParallelLogits)


def _relative(ours: torch.Tensor | None, truth: torch.Tensor, floor: float) -> float:
    if ours is None or ours.shape != truth.shape:
        return math.inf
    ours, truth = ours.double(), truth.double()
    same = ours == truth  # infinities of masks too
    size = truth.masked_fill(same & truth.isinf(), 0).norm().clamp_min(floor or 1e-12)
    return float((ours - truth).masked_fill(same, 0).norm() / size)


def _worst_of_all(errors: dict[str, float], worst: str, mesh: ParallelMesh) -> tuple[dict[str, float], str]:
    found: list[Any] = [(errors, worst)] * mesh.tp_size
    dist.all_gather_object(found, (errors, worst), group=mesh.tp_group)
    total = {name: max((e[name] for e, _ in found), key=_nan_last) for name in errors}
    return total, max(found, key=lambda item: _nan_last(item[0]["gradient"]))[1]


def _nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """First output tensor of every module's first call, by name, in the order the modules finish."""
    found: dict[str, torch.Tensor] = {}
    handles = []

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = output if isinstance(output, torch.Tensor) else None
            if isinstance(output, tuple | list):
                tensor = next((t for t in output if isinstance(t, torch.Tensor)), None)
            if tensor is not None and not _lazy(tensor) and tensor.is_floating_point():
                found.setdefault(name, tensor.detach().clone())

        return keep

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(hook(name)))
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first_gradient(model: nn.Module, truth: Run, ours: Run, record: Sharding) -> str | None:
    """The module of the last parameter, in model order, whose gradient differs: the first in backward."""
    total = math.sqrt(sum(float(g.double().square().sum()) for g in truth.gradients.values() if g is not None))
    errors = gradient_errors(truth, ours, record.layouts, record.mesh.tp_rank, FLOOR * total)
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
