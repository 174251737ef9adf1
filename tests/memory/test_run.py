"""What is said about a Trainer's run before its first step, against the bytes of that step."""

import re
from dataclasses import replace

import peft
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from hf_tokenseek import (
    IstCallback,
    LeanCallback,
    LemoCallback,
    LemoConfig,
    MemoryCallback,
    SeekCallback,
    SeekConfig,
    TokenSeekTrainer,
    VeloraCallback,
)
from hf_tokenseek.memory import MemoryTracker, affordable_ratio, estimate
from hf_tokenseek.memory.run import attached_methods, config_of, simulated, training_of
from tests.lemo.deep_lemo import llama
from tests.lemo.tiny_lemo import lemo
from tests.sft import tiny_sft
from tests.tiny_training import arguments

ROWS, LENGTH = 2, 40
SELECTS = SeekConfig(ratio=0.4, plain_fallback=False)


def data() -> list[dict]:
    """Whole sequences, labelled everywhere: what is simulated."""
    ids = torch.randint(1, 128, (2 * ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


class Counted(TrainerCallback):
    """Bytes of each layer at the end of the forward pass of each step."""

    def __init__(self):
        self.found: list[dict[int, int]] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.tracker = tracker = MemoryTracker(model).__enter__()
        self.hook = model.register_forward_hook(lambda *_: self.found.append(tracker.now.layers_of("activations")))

    def on_step_end(self, args, state, control, **kwargs):
        self.hook.remove()
        self.tracker.__exit__(None, None, None)


def step(folder, model, callbacks, kind=Trainer, seek="plain", **options) -> dict[int, int]:
    """One real step of a run; what its layers kept."""
    counted, init = Counted(), {"model_init": model} if options.pop("init", False) else {"model": model()}
    args = arguments(folder, seek, max_steps=1, **options)
    run = kind(args=args, train_dataset=data(), callbacks=[*callbacks, counted], **init)
    run.train()
    return counted.found[0]


def adapted(model=None, **options):
    """With adapters, in training mode."""
    fields = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    return peft.get_peft_model(wide() if model is None else model, peft.LoraConfig(**fields)).train()


def wide():
    return llama(torch.float32)


def narrow():
    """Of several dtypes, as some models are loaded."""
    model = llama(torch.bfloat16)
    for layer in model.model.layers:
        layer.input_layernorm.float()
    return model


def checkpointed(model, **options):
    model.gradient_checkpointing_enable(**options)
    return model


def frozen_below(count=2):
    model = wide()
    for module in (model.model.embed_tokens, *model.model.layers[:count]):
        module.requires_grad_(False)
    return model


def eager():
    model = wide()
    model.set_attn_implementation("eager")
    return model


def with_input_gradients():
    model = adapted()
    model.enable_input_require_grads()
    return model


# how the model is made; callbacks beside LeMo's; options of the run
RUNS = {
    "LoRA on q and v": (adapted, [], {}),
    "LoRA everywhere": (lambda: adapted(target_modules="all-linear"), [], {}),
    "LoRA with dropout": (lambda: adapted(lora_dropout=0.1), [], {}),
    "LoRA of several ranks": (lambda: adapted(rank_pattern={"v_proj": 9}, init_lora_weights="pissa"), [], {}),
    "LoRA of some layers": (lambda: adapted(layers_to_transform=[1, 3]), [], {}),
    "DoRA": (lambda: adapted(use_dora=True), [], {}),
    "LoRA, norms train": (lambda: adapted(modules_to_save=["input_layernorm"]), [], {}),
    "LoRA, input gradients": (with_input_gradients, [], {}),
    "LoRA of bf16 weights under autocast": (lambda: adapted(llama(torch.bfloat16)), [], {"bf16": True}),
    "LoRA of bf16 weights": (lambda: adapted(llama(torch.bfloat16)), [], {}),
    "LoRA, checkpointing": (adapted, [], {"gradient_checkpointing": True}),
    "neurons, LoRA on attention": (adapted, [], {"lemo": {"mlp": "neurons"}}),
    "several dtypes": (narrow, [], {"bf16": True}),
    "autocast": (wide, [], {"bf16": True}),
    "checkpointing": (wide, [], {"gradient_checkpointing": True}),
    "checkpointing on the model": (lambda: checkpointed(wide()), [], {}),
    "frozen lower layers": (frozen_below, [], {}),
    "eager attention": (eager, [], {}),
    "lean": (wide, [LeanCallback], {}),
    "lean, LoRA": (adapted, [LeanCallback], {}),
    "lean in tiles": (wide, [lambda: LeanCallback(mlp_tiles=3)], {}),
    "seek": (wide, [lambda: SeekCallback(SELECTS)], {}),
    "seek, lean, LoRA, autocast": (adapted, [lambda: SeekCallback(SELECTS), LeanCallback], {"bf16": True}),
    "VeLoRA": (wide, [lambda: VeloraCallback({"groups": 4})], {}),
    "sparse tuning": (wide, [lambda: IstCallback({"layers": 1.0})], {}),
    "closely watched": (wide, [lambda: MemoryCallback(level="layer")], {}),
    "a model of model_init": (wide, [LeanCallback, lambda: VeloraCallback({"groups": 4})], {"init": True}),
}


# LeMo's callback comes before the others, or after them
ORDERS = [*((name, 1) for name in RUNS), ("seek", -1), ("lean", -1), ("closely watched", -1)]


@pytest.mark.parametrize(("name", "order"), ORDERS, ids=str)
def test_the_table_has_the_bytes_of_the_first_step(tmp_path, capsys, name, order):
    model, others, options = RUNS[name]
    options = dict(options)
    config = lemo(**options.pop("lemo", {}))
    before = step(tmp_path, model, [make() for make in others], **options)
    capsys.readouterr()
    after = step(tmp_path, model, [LemoCallback(config), *(make() for make in others)][::order], **options)
    assert_said(capsys.readouterr().out, before, after)


def assert_said(said: str, before: dict[int, int], after: dict[int, int]) -> None:
    sizes = [[found.get(layer, 0) / 2**20 for layer in range(4)] for found in (before, after)]
    lines = re.findall(r"layers (\d) to (\d) +(\S+ -> \S+) MiB each", said)
    assert [layer for first, last, _ in lines for layer in range(int(first), int(last) + 1)] == list(range(4)), said
    for first, last, what in lines:
        for layer in range(int(first), int(last) + 1):
            assert what == f"{sizes[0][layer]:.4g} -> {sizes[1][layer]:.4g}"
    assert f"in all     {sum(sizes[0]):.4g} -> {sum(sizes[1]):.4g} MiB" in said
    assert sum(after.values()) < sum(before.values())


def test_methods_and_weights_are_those_of_a_trainer_that_compresses_gradients(tmp_path, capsys):
    """VeLoRA and sparse tuning change which weights ask for a gradient; the table sees through both."""
    methods = {"velora": {"groups": 4, "compressed_state": True}, "lean": True, "kind": TokenSeekTrainer, "seek": None}
    before = step(tmp_path, wide, [], **methods)
    capsys.readouterr()
    after = step(tmp_path, wide, [], lemo=vars(lemo()), **methods)
    assert_said(capsys.readouterr().out, before, after)
    methods = {"ist": {"layers": 1.0}, "kind": TokenSeekTrainer, "seek": None}
    before = step(tmp_path, wide, [], **methods)
    capsys.readouterr()
    after = step(tmp_path, wide, [], lemo=vars(lemo()), **methods)
    assert_said(capsys.readouterr().out, before, after)


def test_the_table_of_a_trl_run_sees_what_its_fused_head_has_hidden(tmp_path, capsys):
    """trl replaces the model's forward, and so VeLoRA's, after the callbacks have attached."""
    found = []
    for own in ([], [LemoCallback(lemo())]):
        args = tiny_sft.arguments(tmp_path, max_steps=1, optim="adamw_torch", gradient_checkpointing=False)
        callbacks = [*own, VeloraCallback({"groups": 4}), counted := Counted()]
        rows = Dataset.from_list(data())
        words = {"train_dataset": rows, "processing_class": tiny_sft.tokenizer(), "callbacks": callbacks}
        capsys.readouterr()
        SFTTrainer(wide(), args, **words).train()
        found.append(counted.found[0])
    assert_said(capsys.readouterr().out, *found)


def test_methods_are_read_off_the_model_and_not_of_the_arguments(tmp_path):
    """A stock Trainer makes nothing of the fields of ours."""
    seen = []

    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            seen.append(attached_methods(model))

    for callbacks in ([], [LeanCallback(mlp_tiles=2), LemoCallback(lemo())], [SeekCallback(SELECTS)]):
        step(tmp_path, wide, [*callbacks, Look()], seek=SeekConfig(), lean=True)
    assert seen[0] == {}
    assert seen[1] == {"lean": True, "mlp_tiles": 2, "lemo": vars(lemo())}
    assert list(seen[2]) == ["seek"] and seen[2]["seek"]["ratio"] == SELECTS.ratio


def test_a_ratio_is_found_for_what_is_attached(tmp_path):
    """Adapters on two projections take less than everywhere, and lean layers by a callback less than plain ones."""
    args, methods = arguments(tmp_path), {"lean": True, "seek": {"ratio": 0.5}}
    training = replace(training_of(adapted(), args, ROWS, LENGTH), methods=methods)
    budget = estimate(config_of(adapted()), training).peak.bytes
    auto = SeekConfig(ratio="auto", budget_gib=budget / 0.92 / 2**30 + 1e-9)
    step(tmp_path, adapted, [seek := SeekCallback(auto), LeanCallback()])
    lean = replace(training, methods={"lean": True})
    assert seek.handle.config.ratio == affordable_ratio(config_of(adapted()), lean, budget) >= 0.5
    step(tmp_path, adapted, [seek := SeekCallback(auto)])
    assert seek.handle.config.ratio < 0.5
    with pytest.raises(ValueError, match="cannot be found: .* even with the smallest ratio"):
        step(tmp_path, lambda: adapted(target_modules="all-linear"), [SeekCallback(auto), LeanCallback()])


def head_of_another_size():
    model = wide()
    model.lm_head = torch.nn.Linear(32, 130, bias=False)
    return model


def two_adapters():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (head_of_another_size, r"not those that its configuration makes: \['lm_head.weight'\]"),
        (two_adapters, r"not one of LoRA, but \['LORA', 'LORA'\]"),
        (lambda: peft.get_peft_model(wide(), peft.IA3Config(task_type="CAUSAL_LM")), r"but \['IA3'\]"),
        (lambda: checkpointed(wide(), every_n_layers=2), "checkpointing of some layers only"),
        (lambda: checkpointed(wide(), offload=True), "only, offloaded"),
        (
            lambda: checkpointed(wide(), gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": None}),
            "with a context_fn",
        ),
    ],
)
def test_what_is_not_described_is_said_and_not_predicted(tmp_path, model, said):
    model = model()
    with pytest.raises(ValueError, match=said):
        estimate(config_of(model), training_of(model, arguments(tmp_path), ROWS, LENGTH))


def test_what_the_trainer_turns_on_is_seen_as_it_is(tmp_path, capsys):
    some = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
    step(tmp_path, wide, [LemoCallback(lemo())], **some)
    assert "bytes of layers cannot be predicted: gradient checkpointing of some layers" in capsys.readouterr().out
    args = tiny_sft.arguments(tmp_path, activation_offloading=True)
    with pytest.raises(ValueError, match="activation_offloading=True keeps activations elsewhere"):
        training_of(wide(), args, ROWS, LENGTH)


def test_a_trained_predictor_is_simulated_by_another_score():
    trained = LemoConfig(keep=0.3, score="predictor", predictor="folder")
    assert simulated(trained) == LemoConfig(keep=0.3)
