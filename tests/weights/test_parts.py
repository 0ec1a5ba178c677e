"""A part of a sharded model is saved, sent, copied and counted as what it is: shards, made whole or refused."""

from __future__ import annotations

import copy
import io
import os

import peft
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, Trainer, TrainingArguments

import tp_plugin
from tests.support.adapters import adapt
from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import config_for
from tests.support.hub import Hub
from tests.support.models import make, perturb
from tests.support.sharded import differing, folder, sharded
from tests.support.train import engine_for, loss_of, micro_batches, optimizer_for
from tests.support.trainer_cases import config_of
from tp_plugin.config import TensorParallelConfig
from tp_plugin.param_info import layout_of

CASES = (
    "saved_zero_1", "saved_zero_3", "saved_with_adapters", "pushed", "counted", "replicated_is_copied", "by_a_subclass",
    "copied", "layer_copied", "bias_copied", "pickled", "adapted",
    "state_saved", "part_saved_by_torch", "safetensors_saved", "loaded_into_a_whole", "averaged", "bema", "assigned",
    "takes_whole_tensors", "shards_come_back",
)  # fmt: skip


def saved(stage: int, prepare=lambda model: model) -> list[str]:
    """The trunk and a layer's block of a model that was trained a step, against the whole model's tensors."""
    model = prepare(make("Llama", tied=False))
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage))
    for pieces in micro_batches(0, 1):
        engine.backward(loss_of(engine, pieces[0], 0))
        engine.step()
    whole, where = tp_plugin.full_state_dict(engine), folder()
    trunk = engine.module.get_decoder()
    trunk.save_pretrained(where / "trunk")
    tp_plugin.save_pretrained(trunk, where / "again")
    block = tp_plugin.full_state_dict(trunk.layers[0].mlp)
    engine.backward(loss_of(engine, micro_batches(1, 1)[0][0], 1))  # training goes on
    engine.step()
    if dist.get_rank():
        return []
    prefix = next(name for name in whole if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    wanted = {name.removeprefix(prefix): whole[name] for name in whole if name.startswith(prefix)}
    found = AutoModel.from_pretrained(where / "trunk").state_dict()
    wrong = differing(found, wanted) + differing(load_file(where / "again" / "model.safetensors"), wanted)
    layer = {f"layers.0.mlp.{name}": tensor for name, tensor in block.items()}
    return wrong + differing(layer, {name: wanted[name] for name in layer}) + ([] if layer else ["an empty block"])


def saved_zero_1() -> list[str]:
    return saved(1)


def saved_zero_3() -> list[str]:
    return saved(3)


def saved_with_adapters() -> list[str]:
    """Its engine is noted on the model around the adapters; the base is written without them."""
    model = adapt(make("Llama", tied=False), "every linear")
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, 3))
    found = tp_plugin.full_state_dict(engine.module.base_model.model.model.layers[1])
    wanted = tp_plugin.full_state_dict(engine)
    wanted = {n.partition("layers.1.")[2]: t for n, t in wanted.items() if ".layers.1." in n}
    return differing(found, wanted) + ([] if found or dist.get_rank() else ["nothing"])


def pushed() -> tuple[int, list[str]]:
    model = sharded()
    whole = make("Llama").model.state_dict()
    with Hub() as hub:
        model.model.push_to_hub("me/model")
    if dist.get_rank():
        return hub.uploads, []
    return hub.uploads, differing(load_file(hub.directory / "me/model" / "model.safetensors"), whole)


def counted() -> tuple[int, int]:
    return sharded().model.num_parameters(), make("Llama").model.num_parameters()


def replicated_is_copied() -> bool:
    norm = sharded().model.norm
    return torch.equal(copy.deepcopy(norm).weight, norm.weight)


class Encoder(nn.Module):
    """What a library of sentence encoders trains: a transformers model inside a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
        torch.manual_seed(0)
        self.inner = perturb(BertModel(BertConfig(vocab_size=97, max_position_embeddings=32, **sizes)))
        self.dense = nn.Linear(32, 8)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        pooled = self.dense(self.inner(input_ids=input_ids).last_hidden_state.mean(1))
        return {"loss": pooled.square().mean(), "pooled": pooled}


class PartsTrainer(Trainer):
    """Writes parts by itself, on whatever rank it is called, as sentence-transformers' does."""

    def _save(self, output_dir=None, state_dict=None):
        self.model.inner.save_pretrained(output_dir)
        save_model(self.model.dense, f"{output_dir}/dense.safetensors")
        torch.save(self.model.inner.encoder.layer[0].state_dict(), f"{output_dir}/layer.pt")


def by_a_subclass() -> list[str]:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    tp_plugin.register()
    where = folder()
    config = config_of(3) | {"tp_plugin": {"guard": False, "infer": "trusted", "quiet": True}}
    arguments = TrainingArguments(
        str(where), deepspeed=config, max_steps=1, per_device_train_batch_size=2, report_to="none",
        learning_rate=0.0, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(1, 9) + row, "labels": torch.tensor(row)} for row in range(4)]
    trainer = PartsTrainer(model=Encoder(), args=arguments, train_dataset=rows)
    trainer.train()
    assert tuple(layout_of(trainer.model.inner.encoder.layer[0].intermediate.dense.weight).shape) == (48, 32)
    trainer.save_model(str(where / "saved"))
    assert layout_of(trainer.model.inner.state_dict(keep_vars=True)["encoder.layer.0.intermediate.dense.weight"])
    dist.barrier()
    plain = Encoder()
    layer = torch.load(where / "saved" / "layer.pt")
    return (
        differing(load_file(where / "saved" / "model.safetensors"), plain.inner.state_dict())
        + differing(load_file(where / "saved" / "dense.safetensors"), plain.dense.state_dict())
        + differing(layer, plain.inner.encoder.layer[0].state_dict())
    )


def copied() -> None:
    copy.deepcopy(sharded().model)


def layer_copied() -> None:
    torch.optim.swa_utils.AveragedModel(sharded().model.layers[0].mlp)


def bias_copied() -> None:
    """A module whose class is its own and whose table has a column for each of this rank's heads."""
    from tests.support import zoo

    model = zoo.build("t5")
    tp_plugin.shard_model(model, TensorParallelConfig(tp_size=2, quiet=True))
    copy.deepcopy(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias)


def pickled() -> None:
    torch.save(sharded().model, io.BytesIO())


def adapted() -> None:
    peft.get_peft_model(sharded().model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def state_saved() -> None:
    model = sharded()
    torch.save({"epoch": 1, "model": {name: t.clone() for name, t in model.state_dict().items()}}, io.BytesIO())


def part_saved_by_torch() -> None:
    model = sharded()
    torch.save(model.model.layers[0].mlp.down_proj.state_dict(), io.BytesIO())


def safetensors_saved() -> None:
    model = sharded()
    save_model(model.model, str(folder() / "model.safetensors"))


def loaded_into_a_whole() -> None:
    model = sharded()
    make("Llama").load_state_dict(model.state_dict())


def averaged() -> None:
    """An average that was made before sharding."""
    model = make("Llama")
    average = torch.optim.swa_utils.AveragedModel(model)
    tp_plugin.shard_model(model, TensorParallelConfig(tp_size=2, quiet=True))
    average.update_parameters(model)


def bema() -> None:
    from trl import BEMACallback

    BEMACallback().on_train_begin(None, None, None, model=sharded())


def assigned() -> None:
    sharded().load_state_dict(make("Llama").state_dict(), assign=True)


def takes_whole_tensors() -> list[str]:
    model, other = sharded(tied=False), make("Llama", tied=False, seed=1)
    model.load_state_dict(other.state_dict())
    model.model.layers[0].load_state_dict(other.model.layers[0].state_dict())
    found = tp_plugin.full_state_dict(model)
    return differing(found, other.state_dict()) if found else []


def shards_come_back() -> list[str]:
    """Clones of this rank's shards are put back, or saved under other names; smaller models are saved as they are."""
    model = sharded(tied=False)
    kept = copy.deepcopy(model.state_dict())
    for param in model.parameters():
        param.data.zero_()
    model.load_state_dict(kept)
    torch.save({f"rank {dist.get_rank()}": list(kept.values())}, io.BytesIO())
    torch.save(make("Llama", tied=False, intermediate_size=27).state_dict(), io.BytesIO())
    torch.save(make("Llama").state_dict(), io.BytesIO())
    found = tp_plugin.full_state_dict(model)
    return differing(found, make("Llama", tied=False).state_dict()) if found else []


def outcomes() -> list[dict]:
    return launched(2, __name__, CASES)


def test_parts_are_saved_whole():
    for name in ("saved_zero_1", "saved_zero_3", "saved_with_adapters", "by_a_subclass"):
        assert values(outcomes(), name) == [[], []], name


def test_a_part_is_pushed_whole_and_once():
    assert values(outcomes(), "pushed") == [(1, []), (0, [])]


def test_a_part_counts_the_wholes_parameters():
    ours, whole = values(outcomes(), "counted")[0]
    assert ours == whole


def test_a_part_without_shards_is_copied():
    assert values(outcomes(), "replicated_is_copied") == [True, True]


def test_parts_with_shards_are_not_copied_pickled_or_adapted():
    for name in ("copied", "layer_copied", "bias_copied"):
        assert "a sharded model cannot be copied" in sentence(outcomes(), name)
    assert "a sharded model cannot be pickled" in sentence(outcomes(), "pickled")
    assert "put into a LlamaModel inside a sharded model; give PEFT the full model" in sentence(outcomes(), "adapted")


def test_shards_are_no_file_of_weights():
    for name, writer in (("state_saved", "torch.save"), ("part_saved_by_torch", "torch.save")):
        assert f"{writer} was to write this rank's shard of" in sentence(outcomes(), name)
    assert "safetensors was to write this rank's shard of 'embed_tokens.weight'" in sentence(
        outcomes(), "safetensors_saved"
    )


def test_shards_are_not_copied_into_whole_models():
    for name in ("loaded_into_a_whole", "bema"):
        said = sentence(outcomes(), name)
        assert (
            "load_state_dict was given this rank's shard of 'model.embed_tokens.weight' for an unsharded Llama" in said
        )
    assert "AveragedModel is an unsharded model" in sentence(outcomes(), "averaged")
    assert "assign=True" in sentence(outcomes(), "assigned")


def test_a_sharded_model_takes_whole_tensors_and_its_own_shards():
    for name in ("takes_whole_tensors", "shards_come_back"):
        assert values(outcomes(), name) == [[], []], name
