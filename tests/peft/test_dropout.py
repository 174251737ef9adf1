"""LoRA dropout: scouting runs without it, the selected rows with it."""

import pytest
import torch
from peft import get_peft_model

from hf_tokenseek import attach
from tests.peft.tiny_peft import SELECTS, adapted, gradients, lora, micro_batch
from tests.tiny_training import arguments, examples, trainer


def selected(model):
    with attach(model, seek=SELECTS) as handle:
        scouted = {}

        scout = handle.seek.decoder.scout

        def watched(*args):
            state, found = scout(*args)
            # copies: the selected rows write their own keys and values over those that were scouted
            scouted.update(enumerate([tensor.clone() for tensor in pair] for pair in state.kept.values()))
            return state, found

        handle.seek.decoder.scout = watched
        torch.manual_seed(5)
        loss = model(**micro_batch()).loss
        return loss.detach(), gradients(model, loss), scouted, handle.selection


def test_scouting_does_not_drop(tiny_llama):
    """Keys, values and selection are those of the same model without dropout; losses and gradients are not."""
    with_dropout = selected(adapted(tiny_llama(), lora(lora_dropout=0.5)))
    without = selected(adapted(tiny_llama(), lora(lora_dropout=0.0)))
    for layer, pair in without[2].items():
        assert all(torch.equal(a, b) for a, b in zip(with_dropout[2][layer], pair, strict=True))
    assert torch.equal(with_dropout[3], without[3])
    assert with_dropout[0] != without[0]


def test_every_pass_draws_anew_and_a_seed_repeats_it(tiny_llama):
    model = adapted(tiny_llama(), lora(lora_dropout=0.5))
    first, second = selected(model), selected(model)
    assert first[0] == second[0]
    with attach(model, seek=SELECTS):
        torch.manual_seed(5)
        different = {float(model(**micro_batch()).loss) for _ in range(4)}
    assert len(different) == 4 and float(first[0]) in different


def test_checkpointing_recomputes_the_same_dropout(tiny_llama):
    model = adapted(tiny_llama(), lora(lora_dropout=0.5))
    plain = selected(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    checkpointed = selected(model)
    assert checkpointed[0] == plain[0]
    for name, gradient in plain[1].items():
        torch.testing.assert_close(checkpointed[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_trains(tiny_llama, tmp_path, checkpointing):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), lora(lora_dropout=0.3))
    seek = {"context": 0.2, "plain_fallback": False}
    own = trainer(model, arguments(tmp_path, seek, max_steps=20, gradient_checkpointing=checkpointing))
    own.train_dataset = own.eval_dataset = examples(2) * 20
    before = own.evaluate()["eval_loss"]
    own.train()
    assert own.evaluate()["eval_loss"] < before - 0.1
