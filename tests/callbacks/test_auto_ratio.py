"""`SeekConfig(ratio="auto")`: the trainer selects what memory affords."""

from dataclasses import replace

import pytest
import torch

from hf_tokenseek import MemoryCallback, SeekCallback, TokenSeekTrainer
from hf_tokenseek.memory import affordable_ratio, estimate
from hf_tokenseek.memory.budget import RATIOS
from hf_tokenseek.memory.plan import budget_of
from hf_tokenseek.memory.run import config_of, training_of
from tests.tiny_training import arguments, logs, pad

LENGTH = 384


def run(model, args, callbacks=()):
    ids = torch.randint(1, 128, (8, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    # the longest is neither the first nor the last
    ids = [row if number in (2, 5) else row[: LENGTH // 2] for number, row in enumerate(ids)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = TokenSeekTrainer(model, args, train_dataset=rows, data_collator=pad, callbacks=list(callbacks))
    trainer.train()
    return trainer


def peak_bytes_of(ratio, model, args):
    training = replace(training_of(model, args, 2, LENGTH), methods={"seek": {"ratio": ratio}})
    return estimate(config_of(model), training).peak.bytes


def test_a_run_stays_within_its_budget_and_uses_it(tiny_llama, tmp_path):
    args = arguments(tmp_path, seek={"ratio": 0.5})
    # so that what is left when 8 % are set aside is just enough for 0.5
    budget_gib = peak_bytes_of(0.5, tiny_llama(), args) / 0.92 / 2**30 + 1e-9
    memory = MemoryCallback(level="layer")
    args = arguments(tmp_path, seek={"ratio": "auto", "budget_gib": budget_gib})
    trainer = run(tiny_llama(), args, [memory])
    (seek,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, SeekCallback))
    assert seek.handle.config.ratio == 0.5
    peaks = [entry["memory/tracked_peak_mib"] for entry in logs(trainer) if "memory/tracked_peak_mib" in entry]
    assert 0 < max(peaks) <= budget_gib * 1024
    following = RATIOS[RATIOS.index(0.5) + 1]
    assert peak_bytes_of(following, tiny_llama(), args) > budget_of(round(budget_gib * 2**30))


def test_what_fits_whole_trains_as_plain_training(tiny_llama, tmp_path):
    found = run(tiny_llama(), arguments(tmp_path, seek={"ratio": "auto", "budget_gib": 10}))
    plain = run(tiny_llama(), arguments(tmp_path, seek=None))
    for mine, theirs in zip(logs(found), logs(plain), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for p, q in zip(found.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_too_little_is_said_before_the_first_step(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match=r"ratio='auto' cannot be found: .*Or set a number"):
        run(tiny_llama(), arguments(tmp_path, seek={"ratio": "auto", "budget_gib": 1e-6}))


def test_other_methods_of_the_arguments_count(tiny_llama, tmp_path):
    """With lean layers more tokens fit into the same budget."""
    args = arguments(tmp_path, seek={"ratio": 0.5})
    budget_bytes = peak_bytes_of(0.5, tiny_llama(), args)
    budget_gib = budget_bytes / 0.92 / 2**30 + 1e-9
    trainer = run(tiny_llama(), arguments(tmp_path, seek={"ratio": "auto", "budget_gib": budget_gib}, lean=True))
    (seek,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, SeekCallback))
    lean = replace(training_of(tiny_llama(), args, 2, LENGTH), methods={"lean": True})
    assert seek.handle.config.ratio == affordable_ratio(config_of(tiny_llama()), lean, budget_bytes) > 0.5
