"""What we rely on in accelerate. A failure here says what moved upstream and which file of ours uses it."""

import inspect

import accelerate.accelerator
import accelerate.data_loader
import accelerate.scheduler
import accelerate.utils.random
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, memory, operations

from tests.support.moved import assert_source_has
from tp_plugin.integrations.accelerate import unsupported


def test_an_argument_that_moves_is_named(monkeypatch):
    monkeypatch.setattr(Accelerator, "__init__", lambda self, cpu=False: None)
    assert any("accelerate.Accelerator takes no 'deepspeed_plugin' (" in text for text in unsupported.upstream.moved())


def test_what_collects_goes_through_what_we_replace():
    why = "accelerate/gather.py replaces what gather and gather_object call"
    for text in ("self.gather(input_data)", "gather_object(input_data)", "self.gradient_state.remainder"):
        assert_source_has(Accelerator.gather_for_metrics, text, why)
    assert_source_has(Accelerator.gather, "return gather(tensor)", why)
    assert_source_has(operations.gather, "return _gpu_gather(tensor)", why)
    assert_source_has(operations.gather_object, "return _gpu_gather_object(object)", why)
    assert "DEEPSPEED" in operations.TORCH_DISTRIBUTED_OPERATION_TYPES


def test_any_rank_may_raise_the_flag():
    assert_source_has(
        Accelerator.check_trigger, "self.reduce(self.flag_tensor)", "accelerate/gather.py spares the flag"
    )


def test_schedules_step_once_a_process(monkeypatch):
    """If upstream has learnt to count data-parallel ranks here, accelerate/data_parallel.py would divide twice."""
    taken = []

    class Stub:
        optimizers, split_batches, step_with_optimizer = (), False, True
        gradient_state = type("State", (), {"sync_gradients": True})
        scheduler = type("Scheduler", (), {"step": lambda self: taken.append(1)})()

    monkeypatch.setattr(accelerate.scheduler, "AcceleratorState", lambda: type("State", (), {"num_processes": 3}))
    accelerate.scheduler.AcceleratedScheduler.step(Stub())
    assert len(taken) == 3, (
        "AcceleratedScheduler.step no longer asks AcceleratorState().num_processes how often to step"
    )


def test_device_specific_seeds_add_the_process_index(monkeypatch):
    monkeypatch.setattr(accelerate.utils.random, "AcceleratorState", lambda: type("State", (), {"process_index": 4}))
    accelerate.utils.random.set_seed(10, device_specific=True)
    drawn = torch.rand(1)
    accelerate.utils.random.set_seed(14)
    assert drawn == torch.rand(1), (
        "set_seed no longer adds AcceleratorState().process_index; accelerate/data_parallel.py"
    )


def test_accelerate_has_no_backend_for_deepspeed_on_cpu(monkeypatch):
    """If it has one now, accelerate/cpu.py is no longer needed."""
    if torch.accelerator.is_available():
        pytest.skip("a machine with an accelerator")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert PartialState._prepare_backend(object.__new__(PartialState)) == (None, DistributedType.NO)
    assert_source_has(PartialState.__init__, "if self.backend is None:", "accelerate/cpu.py gives it gloo")
    assert_source_has(PartialState.__init__, "if not cpu and", "accelerate/cpu.py keeps cpu from dropping DeepSpeed")


def test_prepare_makes_its_mesh_by_a_name_looked_up_each_time():
    why = "accelerate/data_parallel.py hands the first mesh out again"
    assert_source_has(Accelerator._prepare_deepspeed, "from torch.distributed.device_mesh import init_device_mesh", why)
    assert_source_has(Accelerator._prepare_deepspeed, 'mesh_dim_name = "tp"', why)
    assert_source_has(Accelerator._prepare_deepspeed, "self.state.ds_device_mesh = init_device_mesh(", why)


def test_what_accelerator_does_with_its_number_of_processes():
    """A place that is not among these has to be looked at: does it mean ranks, or readers of distinct data?"""
    readers, ranks = (
        "accelerate/data_parallel.py counts readers there",
        "accelerate/data_parallel.py has it count ranks",
    )
    inside = Accelerator._prepare_deepspeed
    assert_source_has(inside, "scheduler.total_num_steps / self.num_processes", readers)
    assert_source_has(inside, "[batch_size // self.num_processes for batch_size in batch_sizes]", readers)
    assert_source_has(inside, "* self.num_processes // sp_size", "deepspeed/unsupported.py refuses a train_batch_size")
    assert_source_has(Accelerator.prepare_data_loader, "num_processes=self.num_processes,", ranks)
    assert_source_has(Accelerator.is_last_process.fget, "self.process_index == self.num_processes - 1", ranks)
    assert_source_has(Accelerator.num_processes.fget, "return self.state.num_processes", readers)
    places = {
        name: inspect.getsource(inspect.unwrap(found)).count("self.num_processes")
        for name, found in vars(Accelerator).items()
        if inspect.isfunction(found) and "self.num_processes" in inspect.getsource(inspect.unwrap(found))
    }
    assert places == {
        "_prepare_deepspeed": 3,
        "_prepare_megatron_lm": 1,
        "clip_grad_norm_": 1,  # on XLA
        "load_state": 1,  # and multi_device, which DeepSpeed is not
        "prepare_data_loader": 1,
        "split_between_processes": 1,  # its docstring
    }


def test_an_accelerator_keeps_its_models():
    why = "accelerate/rng_state.py restores their random states"
    assert_source_has(Accelerator.__init__, "self._models = []", why)
    assert_source_has(Accelerator.load_state, "for i, model in enumerate(self._models):", why)


def test_data_loaders_read_by_groups():
    """Ranks with one ``process_index // tp`` read one batch; nothing of ours does this."""
    source = accelerate.data_loader.prepare_data_loader
    assert_source_has(source, "process_index = process_index // submesh_tp_size", "TP ranks must read one batch")
    assert_source_has(source, "num_processes = num_processes // submesh_tp_size", "TP ranks must read one batch")


def test_streams_are_dealt_by_what_we_replace():
    dispatcher, why = (
        accelerate.data_loader.DataLoaderDispatcher,
        "accelerate/data_parallel.py deals streams to TP groups",
    )
    assert_source_has(dispatcher._fetch_batches, "range(self.state.num_processes)", why)
    assert_source_has(dispatcher._fetch_batches, "if self.submesh_tp:", why)
    assert_source_has(dispatcher.__iter__, "batch_size = observed_batch_size // self.state.num_processes", why)
    assert_source_has(dispatcher.__iter__, "slice(self.state.process_index * batch_size", why)
    assert_source_has(dispatcher.__iter__, "slice(0, self.state.num_processes)", why)
    assert inspect.getsource(dispatcher.__iter__).count("self.slice_fn(") == 2, f"slice_fn is called elsewhere; {why}"


def test_get_state_dict_needs_us():
    """Accelerate refuses to hand out a sharded model's weights unless DeepSpeed is told to gather 16 bit weights."""
    why = "accelerate/gather.py returns the full state dict instead"
    assert_source_has(Accelerator.get_state_dict, "model.zero_gather_16bit_weights_on_model_save()", why)


def test_a_parallelism_config_is_read_from_the_environment():
    why = "accelerate/unsupported.py refuses it beside DeepSpeed"
    assert_source_has(Accelerator.__init__, "ACCELERATE_USE_PARALLELISM_CONFIG", why)
    assert_source_has(accelerate.parallelism_config.ParallelismConfig, "PARALLELISM_CONFIG_TP_SIZE", why)


def test_a_batch_size_is_found_by_asking_what_we_replace():
    why = "accelerate/unsupported.py refuses to try again on one rank"
    assert_source_has(memory.find_executable_batch_size, "if should_reduce_batch_size(e):", why)
