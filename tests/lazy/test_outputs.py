"""What leaves a model under no_grad has values, whatever it is wrapped in."""

import collections
import dataclasses

import torch
import torch.distributed as dist
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.support.heads import Case
from tests.support.ranks import on_ranks
from tp_plugin.lazy import VocabParallelLogits, materialise_outputs
from tp_plugin.loss import VocabShard

Pair = collections.namedtuple("Pair", "logits other")


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor
    other: object = None


def only_rank_zero_reads():
    vocab = VocabShard.balanced(13, dist.group.WORLD)
    case = Case(vocab.sizes)
    with torch.no_grad():
        output = materialise_outputs(CausalLMOutputWithPast(logits=case.lazy))
    if dist.get_rank() == 0:
        return torch.equal(output.logits.argmax(-1), case.plain.argmax(-1))
    return True


def test_one_rank_alone_may_read_the_outputs():
    assert on_ranks(2, only_rank_zero_reads, timeout_s=120) == [True, True]


def test_every_wrapping_keeps_its_type():
    case = Case()

    def check(x):
        assert type(x) is torch.Tensor
        torch.testing.assert_close(x, case.plain.detach())

    with torch.no_grad():
        check(materialise_outputs(case.lazy))
        made = materialise_outputs(CausalLMOutputWithPast(loss=torch.ones(()), logits=case.lazy))
        assert type(made) is CausalLMOutputWithPast
        check(made.logits)
        check(made["logits"])
        check(made[1])
        made = materialise_outputs((case.lazy, [case.lazy, {"a": (case.lazy, 3)}], None))
        check(made[0])
        check(made[1][0])
        check(made[1][1]["a"][0])
        assert made[1][1]["a"][1] == 3
        made = materialise_outputs(Pair(case.lazy, 2))
        assert type(made) is Pair
        check(made.logits)
        made = materialise_outputs(Frozen(case.lazy))
        assert type(made) is Frozen
        check(made.logits)
        made = materialise_outputs(BatchEncoding({"logits": case.lazy}))
        assert type(made) is BatchEncoding
        check(made["logits"])
        made = materialise_outputs(collections.OrderedDict(x=case.lazy))
        assert type(made) is collections.OrderedDict


def test_what_holds_no_lazy_logits_is_left_alone():
    for output in ((torch.ones(2), "a"), {"x": [1, 2]}, CausalLMOutputWithPast(logits=torch.ones(2)), None, Frozen):
        assert materialise_outputs(output) is output


def test_the_original_is_not_changed():
    case = Case()
    output = {"logits": case.lazy}
    materialise_outputs(output)
    assert isinstance(output["logits"], VocabParallelLogits)
