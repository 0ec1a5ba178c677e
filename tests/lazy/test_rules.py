"""The limits of laziness: each is a rule, and each test fails without its rule."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from tests.support.heads import B, Case, T, V, ce
from tests.support.ranks import on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy import FactoredGrad, lazy_logits


def masked_fill(x, y):
    x.masked_fill_(y.unsqueeze(-1) == 3, -5.0)
    return ce(x, y)


def set_item(x, y):
    x[..., 2:4] = torch.arange(2.0, dtype=x.dtype)
    x[y == -100] = 1.0
    return ce(x, y) + x.square().sum()


def divide(x, y):
    x /= 2
    x.div_(2).mul_(3)
    x += 1
    return ce(x, y) + x[0].square().sum()


def out_argument(x, y):
    x = x.detach()
    torch.mul(torch.ones_like(x), 3.0, out=x)
    return ce(x, y) + torch.zeros((), dtype=x.dtype, requires_grad=True)


def inplace_flag(x, y):
    F.hardtanh(x, -2.0, 2.0, inplace=True)
    return ce(x, y)


def through_a_view_of_columns(x, y):
    x[..., :3].fill_(2.0)
    view = x[..., 3:5]
    view.mul_(3)
    return ce(x, y) + x.square().sum()


def before_the_loss_and_after(x, y):
    first = ce(x.clone(), y)
    x[:, 0] = 0.5
    x = x / 2
    x[:, 1] = 0.25
    return first + ce(x, y)


def on_a_copy(x, y):
    z = x.clone()
    z.zero_()
    x.float().zero_()
    (x * 2).zero_()
    x[torch.tensor([0])].zero_()
    return ce(x, y) + z.sum()


IN_PLACE = [
    masked_fill,
    out_argument,
    set_item,
    divide,
    inplace_flag,
    through_a_view_of_columns,
    before_the_loss_and_after,
    on_a_copy,
]


class Alias(torch.autograd.Function):
    """Identities as other libraries write them: ZeRO-3 wraps the outputs of modules in such."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class AsIs(Alias):
    @staticmethod
    def forward(ctx, x):
        return x


class Detached(Alias):
    @staticmethod
    def forward(ctx, x):
        return x.detach()


class Halving(Alias):
    @staticmethod
    def backward(ctx, grad):
        return (grad.clone() * 0.5 / torch.tensor(2.0)).neg_() if type(grad) is torch.Tensor else -(grad * 0.5 / 2)


def hooked(kind, use):
    def run(x, y):
        return ce(kind.apply(kind.apply(x)), y) + kind.apply(x).logsumexp(-1).sum() + use(kind.apply(x), y)

    return run


def edited_then_hooked(kind):
    def run(x, y):
        x[..., 2] = 0.5
        x[..., 3:5].mul_(2.0)
        shape = x.shape  # anything between the change and the Function
        return ce(kind.apply(x), y) + kind.apply(x).square().sum() + 0 * len(shape)

    return run


def every_rule(sizes):
    uses = {f.__name__: f for f in IN_PLACE}
    for kind in (Alias, AsIs, Detached, Halving):
        uses[f"{kind.__name__} hook"] = hooked(kind, lambda x, y: ce(x[:, :2], y[:, :2]))
        uses[f"{kind.__name__} hook, changed"] = edited_then_hooked(kind)
    worst = {name: Case(sizes).difference(use) for name, use in uses.items()}
    return {name: value for name, value in worst.items() if value > 1e-10}


@pytest.mark.parametrize("sizes", [(13,), (7, 6)])
def test_in_place_changes_are_kept_and_hooks_passed(sizes):
    assert on_ranks(len(sizes), every_rule, sizes) == [{}] * len(sizes)


def test_out_argument_is_kept():
    case = Case()
    x = case.lazy.detach()
    torch.mul(torch.ones(B, T, V, dtype=x.dtype), 3.0, out=x)
    assert (x.materialize() == 3).all()
    with torch.inference_mode():
        x = lazy_logits(*case.own, case.vocab)
        x[..., :3] = 7.0
        x.mul_(2)
        assert (x.materialize()[..., :3] == 14).all()
        assert x.argmax(-1).unique().numel() <= 3


def test_a_change_that_shared_memory_would_show_is_not_lost_silently():
    for twin in (lambda x: x.view(-1, V), lambda x: x[:, 1:], lambda x: x.detach(), lambda x: x.data):
        x = Case().lazy
        view = twin(x)
        x[..., 0] = 1.0
        with pytest.raises(TensorParallelError, match="share memory"):
            view.sum()
        x = Case().lazy
        twin(x).detach().zero_()
        with pytest.raises(TensorParallelError, match="share memory"):
            ce(x, torch.zeros(B, T, dtype=torch.int64))


def test_values_seen_under_no_grad_do_not_cut_the_graph():
    def use(x, y):
        with torch.no_grad():
            x[..., :3].sum()
            x.argmax(-1)
            x[..., 5:].clamp_(max=1.0)
        return ce(x, y)

    assert Case().difference(use) < 1e-10


REFUSED = {
    "retain_grad": lambda x, loss: x.retain_grad(),
    "grad of logits": lambda x, loss: torch.autograd.grad(loss, x),
    "grad of logits, list": lambda x, loss: torch.autograd.grad(outputs=loss, inputs=[x]),
    "backward to logits": lambda x, loss: torch.autograd.backward(loss, inputs=[x]),
    "double backward": lambda x, loss: torch.autograd.grad(loss, x._recipe and Case.leaf, create_graph=True),
    "data_ptr": lambda x, loss: x.data_ptr(),
    "storage": lambda x, loss: x.untyped_storage(),
    "pickle": lambda x, loss: pickle.dumps(x),
    "deepcopy": lambda x, loss: copy.deepcopy(x.detach()),
    "assign data": lambda x, loss: setattr(x, "data", torch.zeros(B, T, V)),
    "requires_grad": lambda x, loss: setattr(x.detach(), "requires_grad", True),
    "requires_grad_": lambda x, loss: x.detach().requires_grad_(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_meaning_raises_a_sentence(what):
    case = Case()
    Case.leaf = case.own[0]
    with pytest.raises(TensorParallelError, match=r"logits|materialize"):
        REFUSED[what](case.lazy, ce(case.lazy, case.labels))


def test_a_hook_may_watch_but_not_compute():
    case, seen = Case(), []
    case.lazy.register_hook(seen.append)
    ce(case.lazy, case.labels).backward()
    assert [type(grad) for grad in seen] == [FactoredGrad]
    case = Case()
    case.lazy.register_hook(lambda grad: print(grad.abs().max()))
    with pytest.raises(TensorParallelError, match="abs"):
        ce(case.lazy, case.labels).backward()
    case = Case()
    case.lazy.register_hook(lambda grad: grad * 2)
    ce(case.lazy, case.labels).backward()
    expected = torch.autograd.grad(2 * ce(case.plain, case.labels), case.full)
    torch.testing.assert_close([x.grad for x in case.own], list(expected))


def test_second_derivative_of_values_is_refused():
    case = Case()
    with pytest.raises(TensorParallelError, match="no second derivative"):
        torch.autograd.grad(case.lazy.square().sum(), case.own[0], create_graph=True)


def test_second_backward_is_right():
    case = Case()
    loss = ce(case.lazy, case.labels) + case.lazy.square().sum()
    first = torch.autograd.grad(loss, case.own, retain_graph=True)
    second = torch.autograd.grad(2 * loss, case.own)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def with_backward(function):
    class Custom(Alias):
        @staticmethod
        def backward(ctx, grad):
            return function(grad)

    return Custom.apply


def test_other_uses_of_the_factored_gradient_name_the_operation():
    for function, name in [
        (lambda g: g * torch.ones(B, T, V), "mul"),
        (lambda g: g + torch.ones(B, T, V), "add"),
        (lambda g: torch.ones(B, T, V) + g, "add"),
        (lambda g: g.sum() * g, "sum"),
        (lambda g: g[..., :1].expand_as(g), "slice"),
        (lambda g: g.masked_fill(torch.ones(V, dtype=torch.bool), 0), "masked_fill"),
        (lambda g: torch.ones_like(g), "ones_like"),
        (lambda g: g.clamp_(max=1), "clamp_"),
        (lambda g: torch.ones(B, T, V).mul_(g), "mul_"),
    ]:
        case = Case()
        loss = ce(with_backward(function)(case.lazy), case.labels)
        with pytest.raises(TensorParallelError, match=name):
            loss.backward()
    case = Case()
    loss = ce(with_backward(lambda g: torch.ones(B, T, V, dtype=g.dtype))(case.lazy), case.labels)
    with pytest.raises(TensorParallelError, match="a dense gradient"):
        loss.backward()
    assert "FactoredGrad(shape" in repr(FactoredGrad((2, 3), torch.float32, torch.device("cpu"), ()))


class TwoOutputs(torch.autograd.Function):
    """Gives zeros to outputs that nobody used, as autograd does by default."""

    @staticmethod
    def forward(ctx, x, other):
        return x.view_as(x), other.view_as(other)

    @staticmethod
    def backward(ctx, grad, other):
        return grad, other


def test_dense_zeros_for_an_unused_output_are_refused():
    case = Case()
    other = torch.ones(2, requires_grad=True)
    _, twin = TwoOutputs.apply(case.lazy, other)
    with pytest.raises(TensorParallelError, match="a dense gradient"):
        twin.sum().backward()
