"""LeMo in trl's trainers: in every layout of the batch, with its fused head and without, with selection."""

import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTTrainer

from hf_tokenseek import LemoCallback, SeekCallback
from tests.sft.test_other_trainers import FIGURES, SETTINGS, pairs
from tests.sft.test_velora import LAYOUTS, parameters_equal
from tests.sft.tiny_sft import (
    SELECTS,
    arguments,
    conversations,
    logged,
    prompt_completion,
    run,
    texts,
    tokenizer,
    trainer,
)

SPARSE = {"keep": 0.5, "block": 4, "dense_first": 1}
# layers choose differently, and few tokens are computed by all of them
STALE = {**SPARSE, "dense_first": 0, "rescore": 1, "score": "random", "labelled": False}
ADAPTERS = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
DATA = {"padded": prompt_completion, "packed": texts, "padding-free": prompt_completion}
pytestmark = pytest.mark.filterwarnings("ignore")  # trl warns of packing without flash attention


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_tokens_train_plainly_and_some_do_not(tiny_llama, tmp_path, layout):
    data = DATA[layout]()
    plain = run(tiny_llama(), arguments(tmp_path, **LAYOUTS[layout]), data, SFTTrainer)
    whole = run(tiny_llama(), arguments(tmp_path, None, lemo={"keep": 1.0}, **LAYOUTS[layout]), data)
    few = run(tiny_llama(), arguments(tmp_path, None, lemo=SPARSE, **LAYOUTS[layout]), data)
    assert logged(whole, "loss") == logged(plain, "loss") and parameters_equal(whole.model, plain.model)
    assert logged(few, "loss") != logged(plain, "loss")
    assert all(0.4 < share < 0.6 for share in logged(few, "lemo/kept_share")[0])


@pytest.mark.parametrize("fields", [SPARSE, STALE, {**SPARSE, "loss": "all"}, {**SPARSE, "mode": "detach"}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fused_head_computes_the_loss_that_logits_have(tiny_llama, tmp_path, layout, fields):
    runs = [
        run(tiny_llama(), arguments(tmp_path, None, lemo=fields, loss_type=kind, **LAYOUTS[layout]), DATA[layout]())
        for kind in ("chunked_nll", "nll")
    ]
    assert logged(runs[0], "loss")[0] == pytest.approx(logged(runs[1], "loss")[0], rel=1e-5)
    for p, q in zip(*(own.model.parameters() for own in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["chunked_nll", "nll"])
def test_the_loss_is_that_of_tokens_that_all_layers_have_computed(tiny_llama, tmp_path, kind):
    """By hand from the hidden states: what the trainer's first step logs, with labels everywhere."""
    seen = {}

    def remember(model, args, kwargs, output):
        if not seen:
            computed = kwargs["lemo"].computed()
            head = own.model.get_output_embeddings().weight.detach()
            seen.update(computed=computed, logits=output[0].detach().float() @ head.T.float())

    own = trainer(tiny_llama(), arguments(tmp_path, None, lemo={**STALE, "keep": 0.7}, loss_type=kind), texts())
    own.model.base_model.register_forward_hook(remember, with_kwargs=True)
    batches = []
    plain_loss = own.compute_loss
    own.compute_loss = lambda model, inputs, **kwargs: (
        batches.append(dict(inputs)) or plain_loss(model, inputs, **kwargs)
    )
    own.train()
    labels = batches[0]["labels"][:, 1:]
    kept = (labels != -100) & seen["computed"][:, :-1]
    assert 0 < kept.sum() < (labels != -100).sum()
    expected = torch.nn.functional.cross_entropy(seen["logits"][:, :-1][kept], labels[kept])
    assert logged(own, "loss")[0][0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("first", [True, False], ids=["lemo first", "seek first"])
@pytest.mark.parametrize("seek", [None, SELECTS], ids=["plain", "seek"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_callback_in_the_stock_trainer_is_the_same_training(tiny_llama, tmp_path, seek, first, layout):
    runs = []
    for stock in (False, True):
        torch.manual_seed(0)
        callbacks = [LemoCallback(SPARSE), *([] if seek is None else [SeekCallback(seek)])]
        how = {"kind": SFTTrainer, "callbacks": callbacks if first else callbacks[::-1]} if stock else {}
        args = arguments(
            tmp_path, *([] if stock else [seek]), **({} if stock else {"lemo": SPARSE}), **LAYOUTS[layout]
        )
        runs.append(run(tiny_llama(), args, DATA[layout](), peft_config=LoraConfig(**ADAPTERS), **how))
    keys = ("loss", "lemo/kept_share", "mean_token_accuracy", "entropy")
    assert logged(runs[0], *keys) == logged(runs[1], *keys) and parameters_equal(runs[0].model, runs[1].model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_seek_everything_selected_is_lemo_alone(tiny_llama, tmp_path, layout):
    # a layer that runs on all tokens would be trained through those that TokenSeek cannot select
    everything, sparse = {"context": 1.0, "plain_fallback": False}, {**SPARSE, "dense_first": 0}
    alone, both = (
        run(tiny_llama(), arguments(tmp_path, seek, lemo=sparse, **LAYOUTS[layout]), DATA[layout]())
        for seek in (None, everything)
    )
    assert logged(both, "loss")[0] == pytest.approx(logged(alone, "loss")[0], rel=1e-5)
    for p, q in zip(both.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("data", [prompt_completion, conversations])
def test_answers_are_computed_by_all_layers(tiny_llama, tmp_path, data):
    """Completion-only and assistant-only labels, and room for them: layers that choose differently lose none."""
    options = {"assistant_only_loss": True} if data is conversations else {}
    args = arguments(tmp_path, None, lemo={**STALE, "labelled": True, "block": 2, "keep": 0.7}, **options)
    own, missed = trainer(tiny_llama(), args, data()), []

    def count(backbone, inputs, kwargs, output):
        blocks, computed = kwargs["lemo"].blocks, kwargs["lemo"].computed()
        of_blocks = computed.gather(1, blocks.tokens.flatten(1).clamp(min=0)).view_as(blocks.tokens)
        missed.append(int((blocks.labelled[:, :, None] & (blocks.tokens >= 0) & ~of_blocks).sum()))
        assert not computed.all() and blocks.labelled.any()

    own.model.base_model.register_forward_hook(count, with_kwargs=True)
    own.train()
    assert missed == [0] * 4


def preferences(tiny_llama, **fields) -> DPOTrainer:
    callbacks = [LemoCallback({**SPARSE, **fields})] if fields else []
    args = DPOConfig(**SETTINGS)
    data, policy, reference = pairs(), tiny_llama(), tiny_llama()
    return DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks)


def test_preferences_need_all_labels_and_detached_tokens_keep_every_figure(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match=r"trl trainer that takes DPOConfig.*loss='all' or mode='detach'"):
        preferences(tiny_llama, keep=0.5)
    with pytest.raises(ValueError, match="loss_type='dft'"):
        trainer(tiny_llama(), arguments(tmp_path, None, lemo=SPARSE, loss_type="dft"))
    stock, own = preferences(tiny_llama), preferences(tiny_llama, mode="detach")
    stock.train(), own.train()
    first = [[values[0] for values in logged(run, *FIGURES)] for run in (stock, own)]
    assert first[1] == pytest.approx(first[0], rel=1e-5, abs=1e-6)
    assert logged(own, "loss") != logged(stock, "loss") and min(logged(own, "lemo/kept_share")[0]) < 0.6
