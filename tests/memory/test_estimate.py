import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Trainer, TrainingArguments

from hf_tokenseek.memory import MemoryTracker, Training, estimate
from hf_tokenseek.memory.estimation import estimate_saved_layers, largest_unit_bytes
from hf_tokenseek.memory.formula import LLAMA_LIKE
from hf_tokenseek.memory.step import attached, build_model, build_optimizer, draw_lowest_layer, loss_of, track_step
from hf_tokenseek.memory.training import OPTIMIZERS, optimizer_of
from hf_tokenseek.seek.ranks import mean_over_ranks
from tests.seek.tiny_families import tiny_config

SMALL = Training(seq=64, batch=2, dtype="fp32", device="cpu")
SEEK = {"seek": {"context": 0.2, "plain_fallback": False}}
LEMO = {"lemo": {"keep": 0.5, "block": 8, "dense_first": 1}}
WAYS = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "lean": {"methods": {"lean": True}},
    "lean+tiles": {"methods": {"lean": True, "mlp_tiles": 3}, "checkpointing": True},
    "seek": {"methods": SEEK},
    "seek+lean+checkpointing": {"methods": {**SEEK, "lean": True}, "checkpointing": True},
    "velora": {"methods": {"velora": {"groups": 4}}},
    "velora-compressed": {"methods": {"velora": {"groups": 4, "compressed_state": True}}},
    "ist": {"methods": {"ist": {"layers": 0.5}}},
    "lemo": {"methods": LEMO},
    "lemo+seek+checkpointing": {"methods": {**LEMO, **SEEK}, "checkpointing": True},
    "lora": {"lora": 4},
    "lora+lemo": {"lora": 4, "methods": LEMO},
    "qlora": {"lora": 4, "load_in_4bit": True},
    "qlora+lean": {"lora": 4, "load_in_4bit": True, "methods": {"lean": True}},
    "qlora+seek+checkpointing": {"lora": 4, "load_in_4bit": True, "methods": SEEK, "checkpointing": True},
    "lora+ist": {"lora": 4, "methods": {"ist": {"layers": 0.5}}},
    "mixed": {"dtype": "mixed"},
    "bf16": {"dtype": "bf16"},
}
# what these refuse is in test_refusals
REFUSED = {("gpt2", way) for way in ("lean", "lean+tiles", "seek+lean+checkpointing", "velora", "velora-compressed")}
CASES = [
    (family, way) for family in ("llama", "gemma2", "qwen3", "gpt2") for way in WAYS if (family, way) not in REFUSED
]


def figures(peaks):
    """Bytes by kind and layer at the largest moment of each phase."""
    return {name: peak.labels for name, peak in peaks.items()}


def config_of(family):
    config = tiny_config(family)
    config.use_cache = False
    return config


@pytest.mark.parametrize(("family", "way"), CASES, ids=lambda value: value)
def test_equals_the_real_step_to_the_byte(family, way):
    if "lora" in way:
        pytest.importorskip("peft")
    if "qlora" in way:
        pytest.importorskip("bitsandbytes")
    config, training = config_of(family), replace(SMALL, **WAYS[way])
    found = estimate(config, training)
    peaks, saved, layers = track_step(build_model(config, training), training)
    assert figures(found.phases) == figures(peaks)
    assert found.saved_bytes == saved > 0
    assert found.saved_layers_bytes == layers == estimate_saved_layers(config, training)
    assert found.peak.bytes == max(peak.bytes for peak in peaks.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_equal_the_real_ones_and_are_the_trainers(optimizer, tmp_path):
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    config, training = config_of("llama"), replace(SMALL, optimizer=optimizer)
    model = build_model(config, training)
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optimizer, use_cpu=True, report_to=[])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    mine, own = optimizer_of(optimizer)
    assert mine is kind
    # the others are rates, or say that nothing is paged
    names = {"fused", "scale_parameter", "relative_step", "optim_bits"}
    assert {name: value for name, value in options.items() if name in names} == own
    assert not options.get("is_paged")
    assert figures(estimate(config, training).phases) == figures(track_step(model, training)[0])


@pytest.mark.parametrize("way", ["plain", "checkpointing", "seek", "lora", "ist", "lean"])
def test_is_the_second_step_of_a_real_run(way):
    """The optimizer's state is added to a first forward and backward pass; here it is there before."""
    if "lora" in way:
        pytest.importorskip("peft")
    config, training = config_of("llama"), replace(SMALL, **WAYS[way])
    model = build_model(config, training)
    ids = torch.zeros(training.batch, training.seq, dtype=torch.long)
    labels = ids.masked_fill(torch.arange(training.seq) < training.seq - training.labels, -100)
    with attached(model, training.methods) as handles:
        optimizer = build_optimizer(model, training, handles)
        handles.begin_step(draw_lowest_layer(handles))
        loss_of(model, training, ids, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        with MemoryTracker(model, ids, labels, optimizer=optimizer) as tracker:
            loss_of(model, training, ids, labels).backward()
            optimizer.step()
    found = estimate(config, training)
    assert found.peak.bytes == tracker.peak.bytes
    for name in ("forward", "backward", "scout"):
        assert name not in tracker.peaks or found.phases[name].kinds == tracker.peaks[name].kinds


def test_nothing_random_moves_on():
    torch.manual_seed(0)
    truth = torch.rand(3)
    torch.manual_seed(0)
    estimate(config_of("llama"), SMALL)
    assert torch.equal(torch.rand(3), truth)


def test_other_ranks_are_not_asked(monkeypatch):
    """A rank may simulate a step by itself; what waits for the others would wait for ever."""

    def refuse(*_, **__):
        raise AssertionError("a simulated step spoke to other ranks")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    for way in ("seek", "velora", "ist", "lemo"):
        estimate(config_of("llama"), replace(SMALL, **WAYS[way]))
    with pytest.raises(AssertionError, match="spoke to other ranks"):
        mean_over_ranks(0.5, torch.device("cpu"))


def test_states_are_what_arithmetic_says():
    config = config_of("llama")
    found = estimate(config, replace(SMALL, dtype="bf16", device="cuda"))
    step = found.phases["step"].kinds
    assert found.parameters == found.trained
    # bf16 weights, gradients and two moments; storages are rounded up to 512 bytes
    assert step["parameters"] == pytest.approx(2 * found.parameters, rel=0.02)
    assert step["gradients"] == pytest.approx(2 * found.parameters, rel=0.02)
    assert step["optimizer"] == pytest.approx(4 * found.parameters, rel=0.1)
    lora = estimate(config, replace(SMALL, lora=2)) if pytest.importorskip("peft") else None
    assert 0 < lora.trained < lora.parameters / 4


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "fp32"},
        {"checkpointing": True},
        {"methods": {"lean": True}},
        {"methods": {"seek": True}},
        {"methods": {"seek": {"context": 1.0}}},
        {"methods": {"seek": True, "lean": True}},
        {"methods": {"seek": True, "lean": True}, "checkpointing": True},
    ],
    ids=str,
)
def test_the_closed_formula(family, options):
    config = AutoConfig.for_model(
        family,
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        use_cache=False,
    )
    found = estimate(config, Training(seq=1024, device="cpu", **options))
    assert found.saved_formula_bytes == pytest.approx(found.saved_bytes, rel=0.01)


def test_where_there_is_no_formula_none_is_printed():
    found = estimate(config_of("gpt2"), SMALL)
    assert found.saved_formula_bytes is None
    assert "closed form" not in found.table()
    # on a GPU float32 has no fused attention of grouped heads
    gpu, cpu = (estimate(config_of("llama"), replace(SMALL, device=device)) for device in ("cuda", "cpu"))
    assert gpu.saved_formula_bytes is None and gpu.saved_bytes > cpu.saved_bytes


def test_parts_of_ranks_are_arithmetic_and_say_so():
    config, whole = config_of("llama"), estimate(config_of("llama"), SMALL)
    for strategy, divided in (("zero1", 1), ("zero2", 2), ("zero3", 3), ("fsdp", 3)):
        found = estimate(config, replace(SMALL, strategy=strategy, ranks=4))
        mine, all_of_it = found.phases["step"].kinds, whole.phases["step"].kinds
        for place, kind in enumerate(("optimizer", "gradients", "parameters")):
            share = 4 if place < divided else 1
            assert mine[kind] == pytest.approx(all_of_it[kind] / share, rel=0.02)
        assert "arithmetic" in found.notes()[0] and strategy in found.notes()[0]
    gathered = found.phases["backward"].kinds["parameters"] - found.phases["step"].kinds["parameters"]
    assert gathered == 2 * largest_unit_bytes(build_model(config, SMALL))


def test_a_gpu_takes_its_own_kernels():
    """They hold no blocks of rows in float32."""
    training = replace(SMALL, methods={**SEEK, "lean": True}, dtype="bf16")
    cpu, gpu = (estimate(config_of("llama"), replace(training, device=device)) for device in ("cpu", "cuda"))
    assert cpu.saved_bytes == gpu.saved_bytes
    assert gpu.phases["scout"].kinds["temporaries"] <= cpu.phases["scout"].kinds["temporaries"]


def test_sparse_tuning_is_simulated_with_its_lowest_layer():
    pytest.importorskip("peft")
    training = replace(SMALL, lora=4, methods={"ist": {"layers": 0.5, "policy": "random"}})
    model = build_model(config_of("llama"), training)
    with attached(model, training.methods) as handles:
        draw_lowest_layer(handles)
        assert handles.ist.active[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq": 1}, "`seq` should be at least 2, got 1"),
        ({"batch": 0}, "`batch` should be at least 1, got 0"),
        ({"labelled": 0.0}, "`labelled` should be a share"),
        ({"dtype": "fp8"}, "`dtype` should be one of .*'bf16'.*got 'fp8'"),
        ({"optimizer": "paged_adamw_8bit"}, "`optimizer` should be one of .*adafactor.*got 'paged_adamw_8bit'"),
        ({"load_in_4bit": True}, "needs adapters. Set `lora` to a rank"),
        ({"device": "tpu"}, "`device` should be one of"),
        ({"methods": {"sek": True}}, r"unknown names \['sek'\]. Allowed: .*'seek'"),
        ({"strategy": "zero1"}, "at least 2 `ranks`"),
        ({"ranks": 2}, "at least 2 `ranks`"),
        ({"strategy": "zero9", "ranks": 2}, "`strategy` should be one of"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


def test_refusals():
    with pytest.raises(ValueError, match="64.*positions|more than the 32 positions"):
        estimate(LlamaConfig(max_position_embeddings=32), SMALL)
    trained = {"lemo": {"score": "predictor", "predictor": "folder"}}
    with pytest.raises(ValueError, match="predictor has real weights"):
        estimate(config_of("llama"), replace(SMALL, methods=trained))
    with pytest.raises(ValueError, match="load_in_4bit and a rank of LoRA"):
        estimate(LlamaConfig(quantization_config={"quant_method": "bitsandbytes"}), SMALL)
    for way, message in (("lean", "finds nothing to swap"), ("velora", "VeLoRA finds no trained linear layer")):
        with pytest.raises(ValueError, match=message):
            estimate(config_of("gpt2"), replace(SMALL, **WAYS[way]))


SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    use_cache=False,
)


@pytest.mark.parametrize(
    ("dtype", "row", "options"),
    [
        ("fp32", "plain", {}),
        ("fp32", "seek default, 5 % labels", {"methods": {"seek": True}}),
        ("bf16", "plain", {}),
        ("bf16", "checkpointing", {"checkpointing": True}),
        ("bf16", "lean", {"methods": {"lean": True}}),
        ("bf16", "seek ratio 0.1", {"methods": {"seek": {"ratio": 0.1}}, "labelled": 1.0}),
    ],
)
def test_equals_what_a_gpu_had(dtype, row, options):
    """Figures of the allocator of an H200; bf16 is autocast there. Peaks are of forward and backward, gradients in."""
    file = Path(__file__).parents[2] / "docs" / "evidence" / "gpu" / "bench_step_8x2048.json"
    (cell,) = (rows for name, rows in json.loads(file.read_text())["cells"].items() if name.startswith(dtype))
    training = Training(seq=2048, batch=8, dtype="mixed" if dtype == "bf16" else dtype, **options)
    found = estimate(SMOLLM2, training)
    assert found.saved_bytes / 2**20 == pytest.approx(cell[row]["saved_mib"], rel=1e-4)
    peak = max((found.phases[name] for name in found.phases if name != "step"), key=lambda peak: peak.bytes)
    above = peak.bytes - peak.kinds["parameters"] - peak.kinds["optimizer"]
    # what the kernels take while they run is not simulated: up to 0.2 GiB
    missing = cell[row]["peak_mib"] - above / 2**20
    assert -0.001 * cell[row]["peak_mib"] < missing < (230 if "seek" in row else 4)


def test_table_and_dict_agree():
    found = estimate(config_of("llama"), replace(SMALL, methods=SEEK))
    shown, kept = found.table(), found.to_dict()
    assert [line.split()[0] for line in shown.splitlines()[1:6]] == list(found.phases) == list(kept["phases"])
    assert kept["peak_bytes"] == sum(kept["phases"][kept["peak_phase"]]["kinds_bytes"].values())
    assert all(note in shown for note in found.notes())
