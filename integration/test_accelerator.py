"""A hand-written Accelerate loop on 4 CPU ranks as tp 2 x dp 2: what it collects, saves and continues from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import tiny
from tests.support.launching import SCRIPTS, deepspeed_config, launch

TP, DP = 2, 2


@pytest.fixture(scope="module", params=[1, 3], ids=["zero1", "zero3"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """The folder of one launch and what each rank reports."""
    folder = tmp_path_factory.mktemp("loop")
    config = deepspeed_config(request.param, gradient_accumulation_steps=1, gradient_clipping=0.5)
    command = [f"{SCRIPTS}/loop.py", str(folder)]
    if request.param == 3:  # accelerate's default there, and a model that is loaded while it holds
        tiny.model().save_pretrained(folder / "start")
        command += ["--start", str(folder / "start")]
    launch(folder, TP * DP, config, command, zero3_init=request.param == 3)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(TP * DP)]


def test_gather_and_reduce_count_a_tensor_parallel_group_once(run):
    """Each rank brings its number; ranks 0 and 2 are the first of their groups."""
    for rank in run[1]:
        assert rank["gather"] == [0, 2]
        assert rank["gather_nested"] == [[0, 2], [[0], [2]]]
        assert (rank["sum"], rank["mean"], rank["max"]) == ([2], [1], [3])


def test_under_zero3_a_model_is_loaded_by_slices(run):
    zero3 = (run[0] / "start").exists()
    assert [rank["head_rows"] for rank in run[1]] == ([66, 65] * DP if zero3 else [tiny.VOCAB] * TP * DP)


def test_functions_imported_by_name_count_it_once_too(run):
    for rank in run[1]:
        assert rank["function_gather"] == [0, 2]
        assert rank["function_objects"] == ["rank 0", "rank 2"]
        assert (rank["function_sum"], rank["function_mean"], rank["function_max"]) == ([2], [1], [3])


def test_a_list_is_dealt_to_groups(run):
    assert [rank["share"] for rank in run[1]] == [["a", "b"], ["a", "b"], ["c"], ["c"]]
    assert [rank["padded_share"] for rank in run[1]] == [["a", "b"], ["a", "b"], ["c", "c"], ["c", "c"]]


def test_any_rank_can_trigger_all(run):
    assert [rank["triggered"] for rank in run[1]] == [True] * 4


def test_preparing_again_makes_no_process_groups(run):
    assert [rank["new_groups"] for rank in run[1]] == [0] * 4


def test_losses_and_schedule_equal_one_process(run):
    ranks = run[1]
    assert all(ranks[k]["first"] == ranks[k + 1]["first"] for k in (0, 2)), "a group reads one batch"
    read = [[rank[part]["read"] for part in ("first", "straight")] for rank in ranks[::TP]]
    steps = [[[first[i]], [second[i]]] for first, second in zip(*read, strict=True) for i in range(2)]
    # Accelerate steps a schedule once for each rank that reads other samples
    expected = tiny.truth(tiny.model(), steps, all_tokens=False, clip=0.5, lr=1e-2, decay=0.9**DP)
    assert ranks[0]["first"]["losses"] + ranks[0]["straight"]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert ranks[0]["straight"]["lr"] == pytest.approx(1e-2 * 0.9 ** (DP * 4))


def test_load_state_continues_bit_equal(run):
    for rank in run[1]:
        assert rank["again"] == rank["straight"]


def test_metrics_see_each_sample_once(run):
    folder, ranks = run
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        guesses = model(input_ids=tiny.batch(list(range(30, 37)))["input_ids"]).logits.argmax(-1)
    for rank in ranks:
        assert rank["numbers"] == rank["forced"] == list(range(30, 37))
        assert rank["objects"] == [f"sample {number}" for number in range(30, 37)]
        assert rank["shapes"] == [[4, tiny.LENGTH, tiny.VOCAB], [3, tiny.LENGTH, tiny.VOCAB]]
        assert rank["guesses"] == guesses.tolist()
        assert rank["training_logits"] == [DP * 2, tiny.LENGTH, tiny.VOCAB]


def test_the_state_dict_is_full_on_rank_0_only(run):
    full = len(tiny.model().state_dict())
    assert [rank["state_keys"] for rank in run[1]] == [full, 0, 0, 0]


def test_a_stream_is_dealt_to_groups(run):
    """Rank 0 reads the stream; every group gets its share, every sample is collected once."""
    ranks = run[1]
    assert ranks[0]["dealt"] == ranks[1]["dealt"]
    assert ranks[2]["dealt"] == ranks[3]["dealt"]
    assert [row[0] for row in ranks[0]["dealt"]] == [0, 4, 8]
    assert [row[0] for row in ranks[2]["dealt"]] == [2, 6, 10]
    assert [rank["collected"] for rank in ranks] == [list(range(11))] * 4
