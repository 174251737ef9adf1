import json

import pytest
import torch

LENGTHS = (128, 256)


def again(*_, **__):
    raise AssertionError("it was measured before")


class ByteTokenizer:
    pad_token_id = 0


def test_steps_and_simulated_steps_end_to_end(script, tiny_llama, tmp_path, capsys, monkeypatch):
    bench = script("bench_lemo")
    monkeypatch.setattr(bench, "real_text", lambda tokenizer, batch, n: torch.randint(1, 128, (batch, n)))
    monkeypatch.setattr(bench, "MODELS", {"tiny": {**bench.LLAMA_1B, "num_hidden_layers": 4}})
    options = ["--tokens", "256", "--fake", *map(str, LENGTHS), "--repeats", "1", "--bars"]
    options += ["--output", str(tmp_path / "lemo.json")]

    def load():
        return tiny_llama(), ByteTokenizer()

    assert bench.main(options, load) == 0
    cells = json.loads((tmp_path / "lemo.json").read_text())["cells"]
    steps, fake = cells["step | 256"], cells["fake | tiny | 256"]
    assert steps.keys() == fake.keys() == bench.ROWS.keys()
    for found in (steps, fake):
        dense, kept = found[bench.DENSE], found[bench.LEMO]
        # one layer of three, two of four, run on half of their tokens
        assert 0.5 < kept["saved_gib"] / dense["saved_gib"] < 1
        assert found[bench.LEMO_SEEK]["saved_gib"] < kept["saved_gib"]
    assert 0.5 < steps[bench.LEMO]["flops"] / steps[bench.DENSE]["flops"] < 1
    assert steps[bench.CHECKPOINTING]["flops"] > 1.2 * steps[bench.DENSE]["flops"]
    assert fake[bench.CHECKPOINTING]["peak_gib"] < fake[bench.DENSE]["peak_gib"]
    # the longest sequence that fits is where the straight line through the lengths meets the memory
    simulated = {n: cells[f"fake | tiny | {n}"] for n in LENGTHS}
    fits = bench.longest(simulated, bench.DENSE, 24)
    (low, high), name = (simulated[n] for n in LENGTHS), bench.DENSE
    slope = (high[name]["peak_gib"] - low[name]["peak_gib"]) / (LENGTHS[1] - LENGTHS[0])
    at_fit = high[name]["constant_gib"] + high[name]["peak_gib"] + slope * (fits - LENGTHS[1])
    assert 24 - slope <= at_fit <= 24 + 1e-6
    monkeypatch.setattr(bench, "measure", again)
    monkeypatch.setattr(bench, "measure_fake", again)
    assert bench.main(options, load) == 0
    printed = capsys.readouterr().out
    assert "| keep 0.4 + checkpointing |" in printed and "Of it the head: " in printed


@pytest.mark.parametrize("n", [512, 200])
def test_flops_of_the_head_are_counted_and_follow_from_the_rows_it_sees(script, tiny_llama, n):
    bench, flops = script("bench_lemo"), script("bench_flops")
    ids = torch.randint(1, 128, (1, n), generator=torch.Generator().manual_seed(0))

    def counted(name: str, tokens: int) -> tuple[int, int]:
        """All that is counted and what the head should take, with a vocabulary of so many tokens."""
        model = tiny_llama()
        model.resize_token_embeddings(tokens)
        model = bench.build(bench.Row("", lora=True), lambda: (model, None))
        rows = flops.head_rows(n, 0.4 if name in (bench.LEMO, bench.LEMO_CHECKPOINTING) else 1.0)
        return bench.count_flops(model, bench.ROWS[name], ids), flops.head_flops(model.config, rows)

    # layers do the same whatever the vocabulary, the head does more; it is never computed again by a checkpoint
    for name in (bench.DENSE, bench.CHECKPOINTING, bench.LEMO, bench.DETACH, bench.LEMO_CHECKPOINTING):
        (small, head_of_small), (large, head_of_large) = counted(name, 128), counted(name, 256)
        assert large - small == head_of_large - head_of_small > 0, name
    # 8 blocks, of which 3 are kept; 4 blocks, of which the first and the last are, with 8 tokens
    assert flops.head_rows(n) == n - 1 and flops.head_rows(n, 0.4) == {512: 3 * 64 - 1, 200: 64 + 8 - 1}[n]


@pytest.mark.parametrize("task", ["text", "needle"])
def test_quality_end_to_end(script, tiny_llama, tmp_path, capsys, monkeypatch, task):
    bench = script("bench_lemo_quality")
    data = [{"input_ids": list(range(1, 121)), "labels": [*[-100] * 90, *range(91, 121)]}] * 6
    monkeypatch.setattr(bench, "load_task", lambda task, tokenizer, split, length, count: data[:count])
    # the published setting needs more layers
    methods = list(bench.METHODS)[:3]
    options = ["--task", task, "--steps", "2", "--lengths", "120", "--seeds", "0", "--eval-examples", "2", "--bars"]
    options += ["--output", str(tmp_path / "quality.json"), "--methods", *methods]

    def load():
        return tiny_llama(), ByteTokenizer()

    assert bench.main(options, load) == 0
    cells = json.loads((tmp_path / "quality.json").read_text())["cells"]
    assert {f"run | {name} | 0" for name in methods} < cells.keys()
    assert all(run["plain | 120"]["loss"] > 0 for name, run in cells.items() if name.startswith("run | "))
    monkeypatch.setattr(bench, "train", again)
    assert bench.main(options, load) == 0
    printed = capsys.readouterr().out
    assert "| keep 0.4 |" in printed and ("perplexity at 120" in printed) == (task == "text")


def test_needles_hide_what_is_asked_for(script, monkeypatch):
    bench = script("bench_lemo_quality")

    class Words:
        """Words are tokens; as much of a fast tokenizer as the task needs."""

        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": text.split(" ")}

        def decode(self, ids):
            return " ".join(ids)

    found = []
    monkeypatch.setattr(bench, "encode", lambda record, tokenizer, length: found.append(record))
    bench.needles(Words(), "test", 400, 3)
    assert len(found) == 3
    for record in found:
        *text, question = record["prompt"].splitlines()
        thing = question.removeprefix("What is the secret code of the ").removesuffix("?")
        assert bench.NEEDLE.format(thing=thing, code=record["completion"]) in text
