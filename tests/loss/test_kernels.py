"""The Triton kernels: interpreted on the CPU against float64 truth, and compiled for real architectures without one."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.loss_problems import V, problem
from tests.support.ranks import ROOT
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import linear_cross_entropy
from tp_plugin.loss.implementations import triton_obstacle

pytest.importorskip("triton", reason="the package triton is published for Linux only")


def run_interpreted(*arguments: str, ranks: int = 1) -> str:
    """``tests.loss.interpreted`` in processes of its own: Triton decides at its import whether it interprets."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "tests.loss.interpreted", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_kernels_equal_the_truth():
    errors = json.loads(run_interpreted("options").splitlines()[-1])
    limits = {"torch.float32": 2e-6, "torch.float16": 2e-3, "torch.bfloat16": 2e-2}
    assert errors.keys() == limits.keys()
    assert all(errors[dtype] <= limit for dtype, limit in limits.items()), errors


def test_kernels_on_uneven_and_empty_shards():
    assert run_interpreted("group", ranks=3).count("equal") == 3


def test_a_rank_whose_kernels_do_not_compile_takes_the_others_along():
    """Each rank would else wait for the other in a chunk of another size, or for the one that raised."""
    said = run_interpreted("broken", ranks=2)
    reason = "they do not compile or run (RuntimeError: Failed to find C compiler) [on rank 1]"
    assert said.count(f"impl='triton' cannot run here: {reason}; use impl='chunked' or 'auto'.") == 2


def compiled(kernel, dtype, capability, flags):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {"products_ptr": f"*{dtype}", "labels_ptr": "*i64"}
    signature = {
        name: kinds.get(name) or ("constexpr" if name.isupper() else "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    constants = {name: flags for name in signature if name.isupper()} | {"BLOCK": 4096}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("flags", [True, False])
def test_kernels_compile_for_gpus(dtype, capability, flags):
    from tp_plugin.loss import kernels

    for kernel in (kernels.statistics_kernel, kernels.gradient_kernel):
        assert compiled(kernel, dtype, capability, flags).asm["cubin"]


def test_asking_for_what_cannot_run_says_why():
    hidden, weight, _, labels = problem(torch.float32)
    with pytest.raises(TensorParallelError, match="it needs a CUDA or ROCm device, the inputs are on cpu"):
        linear_cross_entropy(hidden, weight, labels, impl="triton")
    assert "its arithmetic is float32" in (triton_obstacle(torch.device("cuda"), torch.float64) or "")
    assert triton_obstacle(torch.device("cuda"), torch.bfloat16) is None
    assert weight.shape[0] == V
