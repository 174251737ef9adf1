import json

import pytest
import torch
from transformers import TrainingArguments

from hf_tokenseek.callbacks import MemoryCallback
from hf_tokenseek.callbacks import out_of_memory as module
from hf_tokenseek.memory.peaks import KINDS
from hf_tokenseek.memory.run import training_of
from tests.tiny_training import SELECTS, arguments, logs, trainer

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def fails(monkeypatch):
    """Lets the second backward pass fail with an error."""

    def install(error):
        original, calls = torch.Tensor.backward, []

        def backward(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "backward", backward)

    return install


@pytest.mark.parametrize("error", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("level", ["step", "layer"])
def test_the_file_has_what_was_alive_and_what_would_fit(tiny_llama, tmp_path, fails, error, level):
    fails(error)
    model = tiny_llama()
    run = trainer(model, arguments(tmp_path, seek=SELECTS), callbacks=[MemoryCallback(level=level)])
    with pytest.raises(RuntimeError) as raised:
        run.train()
    assert raised.value is error
    text = (tmp_path / "out_of_memory_0.txt").read_text()
    assert str(error).splitlines()[0] in text
    assert ("optimizer  activations" in text) == (level == "layer")
    assert ("trainer.py" in text) == (level == "layer")
    # everything fits a model of this size: the first three
    assert "2 x 24 tokens" in text
    for way in ("plain ", "lean ", "chunked loss"):
        assert f"  {way}" in text
    # nothing is left at work
    assert torch._C._len_torch_dispatch_stack() == 0
    assert run._callback(MemoryCallback).watch is None or run._callback(MemoryCallback).watch.tracker is None


def test_other_errors_leave_no_file_and_no_tracker(tiny_llama, tmp_path, fails):
    fails(RuntimeError("something else"))
    run = trainer(tiny_llama(), arguments(tmp_path, seek=None), callbacks=[MemoryCallback(level="layer")])
    with pytest.raises(RuntimeError, match="something else"):
        run.train()
    assert not list(tmp_path.glob("out_of_memory*"))
    assert torch._C._len_torch_dispatch_stack() == 0


def test_what_cannot_be_simulated_is_said(tiny_llama, tmp_path, fails):
    fails(GPU)
    run = trainer(tiny_llama(), arguments(tmp_path, seek=None, optim="adagrad"))
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    assert "cannot be simulated: `optimizer` should be one of" in (tmp_path / "out_of_memory_0.txt").read_text()


def test_the_training_is_that_of_the_run(tiny_llama, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to=[])
    found = training_of(tiny_llama(), args, 3, 10)
    assert (found.seq, found.batch, found.labelled, found.dtype, found.lora) == (10, 3, 1.0, "mixed", None)
    narrow = tiny_llama().to(torch.bfloat16)
    # autocast casts adapters and what they read, whatever the weights are
    assert training_of(narrow, args, 3, 10).dtype == "mixed"
    args.bf16 = False
    assert training_of(narrow, args, 3, 10).dtype == "bf16"
    args.gradient_checkpointing = True
    assert training_of(tiny_llama(), args, 3, 10).checkpointing and not found.checkpointing
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=6, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert training_of(adapted, args, 3, 10).lora == 6
    with pytest.raises(ValueError, match="not called with labels"):
        module.advise(tiny_llama(), args, None)


def test_level_layer_logs_the_first_steps(tiny_llama, tmp_path):
    callback = MemoryCallback(level="layer")
    run = trainer(tiny_llama(), arguments(tmp_path, seek=SELECTS), callbacks=[callback])
    run.train()
    *tracked, last = logs(run)
    for entry in tracked:
        kinds = [entry[f"memory/{kind}_mib"] for kind in KINDS]
        assert sum(kinds) == pytest.approx(entry["memory/tracked_peak_mib"])
        phases = [entry[f"memory/{name}_peak_mib"] for name in ("forward", "scout", "select", "backward", "step")]
        assert max(phases) == entry["memory/tracked_peak_mib"]
        assert all(entry[f"memory/layer_{index}_mib"] > 0 for index in range(3))
        assert entry["memory/saved_activations_mib"] > 0
        assert "speed/step_seconds" not in entry
    assert "memory/tracked_peak_mib" not in last and "speed/step_seconds" in last
    (sizes,) = callback.layer_mib.values()
    assert sizes == [tracked[-1][f"memory/layer_{index}_mib"] for index in range(3)]
    run.save_state()
    json.loads((tmp_path / "trainer_state.json").read_text())


@pytest.mark.parametrize("seek", [None, SELECTS], ids=["plain", "seek"])
def test_level_layer_changes_nothing(tiny_llama, tmp_path, seek):
    runs = []
    for level in ("step", "layer"):
        run = trainer(tiny_llama(), arguments(tmp_path, seek=seek), callbacks=[MemoryCallback(level=level)])
        run.train()
        runs.append(([entry["loss"] for entry in logs(run)], list(run.model.parameters()), run))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    figures = [[entry["memory/saved_activations_mib"] for entry in logs(run)] for *_, run in runs]
    # ids and labels of a step are saved as well
    assert figures[0] == pytest.approx(figures[1], rel=0.01)


def test_levels_that_a_run_does_not_admit(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match=r"`level` should be one of \['step', 'layer', 'snapshot'\], got 'deep'"):
        MemoryCallback(level="deep")
    run = trainer(tiny_llama(), arguments(tmp_path, seek=None), callbacks=[MemoryCallback(level="snapshot")])
    with pytest.raises(ValueError, match="CUDA's allocator, and the run is on 'cpu'. Use level='layer'"):
        run.train()
    compiled = arguments(tmp_path, seek=None, torch_compile=True)
    with pytest.raises(ValueError, match="torch_compile replaces. Use level='step'"):
        trainer(tiny_llama(), compiled, callbacks=[MemoryCallback(level="layer")]).train()
