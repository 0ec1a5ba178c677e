"""Mixtures of experts and latent attention beyond parity: collectives, router, export, generation, refusals."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open

import tp_plugin
from tests.support.batched_cases import launched, sentence, values
from tests.support.models import batch, make
from tests.support.moe import SIZES
from tests.support.per_layer import collectives, sharded
from tests.support.ranks import on_ranks
from tp_plugin.param_info import layout_of

NAMED = tuple(SIZES)

# ---- what two ranks do -----------------------------------------------------------------------------------------------


def mixtral():
    return [collectives("Mixtral", 2, (4, 2), stage) for stage in (None, 1, 3)]


def qwen2_moe():
    return [collectives("Qwen2Moe", 2, (4, 2), stage) for stage in (None, 1, 3)]


def deepseek_v3():
    return [collectives("DeepseekV3", 2, (4, 4), stage) for stage in (None, 1, 3)]


def router_logits():
    """Largest difference of the router's logits and of the auxiliary loss from those of one process."""
    worst = 0.0
    for family in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe"):
        data = batch(0, 2)
        ours = sharded(family)(**data, output_router_logits=True)
        truth = make(family).train()(**data, output_router_logits=True)
        assert truth.aux_loss > 0
        worst = max(worst, float((ours.aux_loss - truth.aux_loss).abs() / truth.aux_loss))
        for mine, theirs in zip(ours.router_logits, truth.router_logits, strict=True):
            assert mine.shape == theirs.shape
            worst = max(worst, float((mine - theirs).abs().max()))
            everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, mine.detach())
            assert torch.equal(everyone[0], everyone[1])
    return worst


def balance():
    """By family: what the fullest rank holds over the mean; what the fullest rank holds of the whole."""
    found = {}
    for family in NAMED:
        record = sharded(family).tp_sharding
        assert f"{len(record.plan.mixtures)} mixtures of experts sharded inside" in record.summary()
        held = [record.numel(rank) for rank in range(2)]
        found[family] = max(held) / (sum(held) / 2), record.fraction()
    return found


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def exports():
    """By family: what is wrong with the export, and how many names the hub's layout has that the module has not."""
    found: dict[str, tuple[str, int]] = {}
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        for family in NAMED:
            model, folder = sharded(family).eval(), Path(shared[0]) / family
            names = set(model.state_dict())
            with torch.no_grad():
                logits = model(input_ids=batch(9, 2)["input_ids"]).logits
            tp_plugin.save_pretrained(model, folder)
            wrong = ""
            if dist.get_rank() == 0:
                make(family).save_pretrained(folder / "plain")
                ours, plain = tensors_in(folder), tensors_in(folder / "plain")
                if list(ours) != list(plain):
                    wrong = f"names: {sorted(set(ours) ^ set(plain))}"
                elif not all(torch.equal(ours[name], plain[name]) for name in plain):
                    wrong = "values"
                elif json.loads((folder / "config.json").read_text()) != json.loads(
                    (folder / "plain" / "config.json").read_text()
                ):
                    wrong = "config"
                reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
                with torch.no_grad():
                    error = (reloaded(input_ids=batch(9, 2)["input_ids"]).logits - logits).abs().max()
                wrong = wrong or (f"logits differ by {error}" if error > 1e-5 else "")
                names ^= set(ours)
            found[family] = wrong, len(names)
        dist.barrier()
    return found


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
}


def generation():
    """Families and ways whose tokens are not those of one process."""
    wrong = []
    for family in ("Qwen2Moe", "GptOss", "DeepseekV3"):
        ours, truth = sharded(family).eval(), make(family).eval()
        for way, options in WAYS.items():
            tokens = []
            for model in (ours, truth):
                torch.manual_seed(3)
                data = batch(4, 2, length=5)["input_ids"]
                tokens.append(model.generate(data, max_new_tokens=12, min_new_tokens=12, **options))
            if not torch.equal(*tokens):
                wrong.append((family, way))
    return wrong


def cache():
    """(KV heads, or width of the latent) in the cache of one process and of this rank."""
    found = {}
    for family, axis in (("Qwen2Moe", 1), ("DeepseekV3", 3)):
        data = batch(4, 2, length=5)["input_ids"]
        with torch.no_grad():
            caches = [model.eval()(data, use_cache=True).past_key_values for model in (make(family), sharded(family))]
        found[family] = [cache.layers[0].keys.shape[axis] for cache in caches]
    return found


def too_narrow():
    sharded("Qwen3Moe", moe_intermediate_size=1)


def not_aligned():
    sharded("Qwen3Moe", moe_intermediate_size=4)


def latent_heads_do_not_fit():
    sharded("DeepseekV3", heads=(1, 1))


def foreign_implementation():
    model = make("Qwen3Moe")
    model.config._experts_implementation = "deepgemm"
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2))


def late_change():
    """Grouped to batched as generate() does on CUDA, and back; others are refused and change nothing."""
    model = sharded("Qwen3Moe").eval()
    data = batch(4, 2)["input_ids"]
    with torch.no_grad():
        grouped = model(data).logits
        model.set_experts_implementation("batched_mm")
        torch.testing.assert_close(model(data).logits, grouped)
    refusals = []
    for change in (lambda: model.set_experts_implementation("sonicmoe"), lambda: setattr(model, "use_kernels", True)):
        with pytest.raises(tp_plugin.TensorParallelError) as refused:
            change()
        refusals.append(str(refused.value))
    return model.get_experts_implementation()[""], refusals


def compiled(*families):
    """Compiled training forwards give the loss and the gradients of one process that is not compiled."""
    for family in families or ("Qwen2Moe",):
        data, plain, ours = batch(0, 2), make(family).train(), sharded(family)
        loss = torch.compile(ours, backend="aot_eager")(**data).loss
        loss.backward()
        truth = plain(**data).loss
        truth.backward()
        torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
        wanted = dict(plain.named_parameters())
        for name, param in ours.named_parameters():
            layout = layout_of(param)
            grad = wanted[name].grad if layout is None else layout.shard(wanted[name].grad, dist.get_rank())
            torch.testing.assert_close(param.grad, grad, rtol=1e-3, atol=1e-5, msg=f"{family}: {name}")


RUN = (
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "router_logits",
    "balance",
    "exports",
    "generation",
    "cache",
    "late_change",
    "compiled",
)
REFUSED = {
    "too_narrow": r"model.layers.0.mlp.experts.* 1, fewer than the 2 ranks; choose .*autotp_size at most 1",
    "not_aligned": r"of width 4 do not give each of 2 ranks rows .*autotp_size at most 1 or call .*'eager'",
    "latent_heads_do_not_fit": r"model.layers.0.self_attn: 1 query and 1 key/value heads .* from \[1\]",
    "foreign_implementation": r"experts implementation 'deepgemm' is not supported .* eager, grouped_mm, batched_mm",
}


def results() -> list[dict]:
    return launched(2, __name__, (*RUN, *REFUSED))


# ---- what is expected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("mixtral", 2 * (1 + 1), 2 * (1 + 2)),  # a layer: attention, experts; hidden states and routing weights enter
        ("qwen2_moe", 2 * (1 + 1), 2 * (1 + 3)),  # shared experts cost nothing; the gate of their output enters
        ("deepseek_v3", 2 * (1 + 1), 2 * 3 + 1 + 2),  # attention: two latents and a key; a dense layer and a mixture
    ],
)
def test_a_mixture_leaves_by_one_all_reduce(name, forward, backward):
    for found in values(results(), name):
        for stage, counts in zip((None, 1, 3), found, strict=True):
            # the embedding leaves its region once more; the loss is one all-gather and one all-reduce
            expected = {("leave", False): forward + 1, ("enter", True): backward, ("loss", False): 2}
            assert counts == expected, f"ZeRO {stage}"


def test_router_logits_and_auxiliary_loss_are_those_of_one_process():
    assert max(values(results(), "router_logits")) < 1e-5


def test_ranks_are_balanced():
    for found in values(results(), "balance"):
        for family, (above_mean, fraction) in found.items():
            assert above_mean <= 1.05, family
            assert fraction <= 0.6, family


def test_exports_are_what_plain_save_pretrained_writes():
    for family, (wrong, renamed) in values(results(), "exports")[0].items():
        assert not wrong, f"{family}: {wrong}"
        # conversion is shown where the hub's layout is not that of the modules
        assert (renamed > 0) == (family != "GptOss"), family


def test_generation_gives_the_tokens_of_one_process():
    assert values(results(), "generation") == [[], []]


def test_the_cache_holds_this_ranks_heads_or_the_latent():
    for found in values(results(), "cache"):
        assert found == {"Qwen2Moe": [2, 1], "DeepseekV3": [12, 12]}


def test_compiled_mixtures_equal():
    values(results(), "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GptOss", "DeepseekV3"])
def test_other_compiled_mixtures_equal(family):
    on_ranks(2, compiled, family)


def test_a_late_change_of_the_implementation_is_checked():
    for implementation, (other, kernels) in values(results(), "late_change"):
        assert implementation == "batched_mm"
        assert "'sonicmoe' is not supported" in other
        assert "kernels of the hub" in kernels


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_weight_is_touched(name):
    import re

    assert re.search(REFUSED[name], sentence(results(), name))
