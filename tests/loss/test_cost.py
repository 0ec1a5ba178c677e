"""What the loss costs: collectives, counted, and memory, added up."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.live_bytes import LiveBytes
from tests.support.loss_problems import problem
from tests.support.ranks import on_ranks
from tp_plugin.collectives import counted
from tp_plugin.loss import VocabShard, linear_cross_entropy

N, H, V = 12, 6, 23


def kinds(counter):
    found = [r.kind for r in counter.records]
    return found.count("all_gather"), found.count("all_reduce"), len(found)


def cost():
    """(all-gathers, all-reduces, all) of forward and backward for several ways, three chunks of rows each."""
    vocab = VocabShard.balanced(V, dist.group.WORLD)
    hidden, weight, _, labels = problem(n=N)
    h, w = hidden.requires_grad_(), weight[vocab.start : vocab.stop].requires_grad_()
    budget = 4 * 2 * 8 * max(vocab.sizes)  # four rows of two chunks
    ways = {
        "mean": {},
        "smoothing, z": {"label_smoothing": 0.1, "z_loss": 0.1},
        "none": {"reduction": "none"},
        "recompute": {"recompute": True},
        "frozen trunk": {"hidden": hidden.detach()},
        "stats": {"return_stats": True, "workspace_bytes": 4 * (2 + 1 + 0) * 8 * max(vocab.sizes)},
    }
    found = {}
    for name, options in ways.items():
        given = {"hidden": h, "weight": w, "labels": labels, "vocab": vocab, "workspace_bytes": budget} | options
        with counted() as forward:
            loss = linear_cross_entropy(**given)
        loss = loss[0] if isinstance(loss, tuple) else loss
        with counted() as backward:
            loss.sum().backward()
        found[name] = kinds(forward), kinds(backward)
    with counted() as counter, torch.no_grad():
        linear_cross_entropy(hidden, w, labels, vocab=vocab, workspace_bytes=budget)
    found["no grad"] = kinds(counter), (0, 0, 0)
    nbytes = {r.nbytes for r in counter.records}
    return found, nbytes


def test_one_gather_and_one_reduction_a_chunk():
    for found, nbytes in on_ranks(2, cost):
        assert found == {
            "mean": ((3, 3, 6), (0, 0, 0)),
            "smoothing, z": ((3, 3, 6), (0, 0, 0)),
            "none": ((3, 0, 3), (0, 1, 1)),
            "recompute": ((3, 0, 3), (0, 1, 1)),
            "frozen trunk": ((3, 0, 3), (0, 0, 0)),
            "stats": ((3, 3, 6), (0, 0, 0)),
            "no grad": ((3, 0, 3), (0, 0, 0)),
        }
        assert nbytes == {3 * 4 * 8}  # maximum, sum and target of four rows


def exchanges():
    """The shards' sizes are exchanged once a weight, not once a step."""
    vocab = VocabShard.balanced(V, dist.group.WORLD)
    hidden, weight, _, labels = problem(n=N)
    own = weight[vocab.start : vocab.stop].clone()
    with counted() as counter:
        for _ in range(3):
            linear_cross_entropy(hidden, own, labels, group=dist.group.WORLD)
    return [r.purpose for r in counter.records]


def test_sizes_are_exchanged_once():
    assert on_ranks(2, exchanges) == [["setup", "loss", "loss", "loss"]] * 2


def peak(n, dtype, workspace, *, frozen="", ranks=1, **options):
    """Bytes beyond inputs and gradients at the worst moment of forward and backward; H and v as in the test."""
    h, v = 64, 1000
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, h).to(dtype), torch.randn(v, h).to(dtype)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    labels = torch.randint(0, v, (n,))
    with LiveBytes().ignore(hidden, weight, labels) as seen:
        loss = linear_cross_entropy(hidden, weight, labels, workspace_bytes=workspace, **options)
        loss.sum().backward()
    outputs = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return seen.peak - outputs, 4 * v * h, 4 * n * h


@pytest.mark.parametrize("n", [256, 1024, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["mean", "smoothing, cap", "frozen weight", "none", "recompute"])
def test_memory_is_workspace_and_one_accumulator_at_any_length(n, dtype, way):
    workspace = 1 << 19
    options = {
        "smoothing, cap": {"label_smoothing": 0.1, "softcap": 20.0},
        "frozen weight": {"frozen": "weight"},
        "none": {"reduction": "none"},
        "recompute": {"recompute": True},
    }.get(way, {})
    extra, accumulator, rows = peak(n, dtype, workspace, **options)
    allowed = workspace + 2 * rows  # O(NH): hidden gradient in float32 and statistics
    if way in ("mean", "smoothing, cap"):
        allowed += accumulator
    assert extra <= allowed, f"{extra} bytes beyond inputs and outputs, {allowed} allowed"


def test_a_single_chunk_needs_no_accumulator():
    extra, accumulator, rows = peak(64, torch.bfloat16, 1 << 20)
    assert extra <= 64 * 1000 * 6 + rows + 64 * 100 < accumulator + 64 * 1000 * 6


def test_a_fraction_of_plain_memory():
    """With a tenth of the logits as workspace: at most a fifth of plain PyTorch's, gradients included in both."""
    from tp_plugin.loss import reference_cross_entropy

    n, h, v = 4096, 64, 4000
    found = {}
    for name in ("ours", "plain"):
        torch.manual_seed(0)
        hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
        labels = torch.randint(0, v, (n,))
        with LiveBytes().ignore(hidden, weight, labels) as seen:
            if name == "ours":
                linear_cross_entropy(hidden, weight, labels, workspace_bytes=n * v * 4 // 10).backward()
            else:
                reference_cross_entropy(hidden, weight, labels)[0].backward()
        found[name] = seen.peak
    assert found["ours"] <= 0.2 * found["plain"], found


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


def test_frozen_parts_skip_their_product():
    """The logits', the hidden gradient's, the weight gradient's."""
    hidden, weight, _, labels = problem(torch.float32, n=N)
    for frozen, products in ((None, 3), ("hidden", 2), ("weight", 2), ("both", 1)):
        for options, again in (({}, 0), ({"recompute": True}, 1)):
            h = hidden.clone().requires_grad_(frozen not in ("hidden", "both"))
            w = weight.clone().requires_grad_(frozen not in ("weight", "both"))
            with Products() as counted_products:
                loss = linear_cross_entropy(h, w, labels, **options)
                if frozen != "both":
                    loss.backward()
            assert counted_products.count == products + (again if frozen != "both" else 0)


def on_meta(function, n, h, v):
    """Peak bytes beyond inputs and gradients of bfloat16 tensors that have sizes and no memory."""
    hidden, weight = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta").requires_grad_() for shape in [(n, h), (v, h)]
    )
    labels = torch.empty(n, dtype=torch.int64, device="meta")
    with LiveBytes().ignore(hidden, weight, labels) as seen:
        grads = torch.autograd.grad(function(hidden, weight, labels), [hidden, weight])
    return seen.peak - sum(grad.nbytes for grad in grads)


def test_a_fraction_of_plain_memory_at_the_size_of_a_real_head():
    """8192 tokens, Llama 3's vocabulary: at most a fifth of plain PyTorch's, and 0.07 with recomputation."""
    size = 8192, 4096, 128256
    plain = on_meta(lambda h, w, y: torch.nn.functional.cross_entropy((h @ w.t()).float(), y), *size)
    assert on_meta(linear_cross_entropy, *size) <= 0.20 * plain
    assert on_meta(lambda h, w, y: linear_cross_entropy(h, w, y, recompute=True), *size) <= 0.07 * plain
