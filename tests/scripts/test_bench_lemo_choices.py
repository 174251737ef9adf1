import json

import pytest
import torch

TOKENS, BLOCK = 512, 64


class Tokenizer:
    pad_token_id = 0


def records(labelled):
    """Sequences whose last tokens are labelled."""

    def load(tokenizer, split, length):
        drawn = torch.randint(1, 128, (3, length), generator=torch.Generator().manual_seed(0)).tolist()
        return [{"input_ids": ids, "labels": [-100] * (length - labelled) + ids[length - labelled :]} for ids in drawn]

    return load


@pytest.fixture
def bench(script, monkeypatch):
    bench = script("bench_lemo_choices")
    monkeypatch.setattr(bench, "DATA", {bench.LONG_PROMPT: records(8), bench.SOURCE_TEXT: records(TOKENS)})
    monkeypatch.setattr(bench, "CHOICES", bench.CHOICES | {"keep 1": {"keep": 1.0}})
    return bench


@pytest.fixture
def call(bench, tiny_llama, tmp_path):
    """Runs the bench; returns its cells."""

    def call(load=None):
        options = ["--tokens", str(TOKENS), "--sequences", "2", "--output", str(tmp_path / "choices.json"), "--bars"]
        assert bench.main(options, load or (lambda: (tiny_llama(), Tokenizer()))) == 0
        return json.loads((tmp_path / "choices.json").read_text())["cells"]

    return call


def test_plain_and_sparse_losses_are_of_the_same_labels(bench, call, tiny_llama):
    cells, model = call(), tiny_llama().eval()
    for data, labelled in ((bench.LONG_PROMPT, 8), (bench.SOURCE_TEXT, TOKENS)):
        for index, record in enumerate(bench.DATA[data](None, "test", TOKENS)[:2]):
            ids = torch.tensor([record["input_ids"]])
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            figures = {name: cells[f"{data} | {name}"][index] for name in bench.CHOICES}
            assert figures["keep 1"]["sparse"] == pytest.approx(figures["keep 1"]["plain"], rel=1e-5)
            all_labels = losses[-labelled:].mean().item()
            for name in ("keep 1", bench.ALL_LABELS):
                assert figures[name]["share"] == 1
                assert figures[name]["plain"] == pytest.approx(all_labels, rel=1e-5)
            assert figures[bench.ALL_LABELS]["sparse"] != figures[bench.ALL_LABELS]["plain"]
            # of eight blocks three are kept: the first and the last two
            kept = torch.cat([losses[:BLOCK], losses[-2 * BLOCK + 1 :]]) if labelled == TOKENS else losses[-labelled:]
            assert figures["score recency"]["plain"] == pytest.approx(kept.mean().item(), rel=1e-5)
            counted = 3 * BLOCK - 1 if labelled == TOKENS else labelled
            assert figures["score recency"]["share"] == pytest.approx(counted / min(labelled, TOKENS - 1))


def test_goes_on_where_it_stopped(bench, call, tmp_path, monkeypatch):
    cells, path = call(), tmp_path / "choices.json"
    stored, missing = json.loads(path.read_text()), f"{bench.SOURCE_TEXT} | score random"
    for part in ("cells", "made_in"):
        del stored[part][missing]
    path.write_text(json.dumps(stored))
    made, measure = [], bench.measure

    def noted(model, batches, plain, choice):
        made.append(choice)
        return measure(model, batches, plain, choice)

    monkeypatch.setattr(bench, "measure", noted)
    # what is random follows from a sequence's number: the same again
    assert call() == cells and made == [{"score": "random"}]
    # nothing is missing: nothing is loaded
    assert call(load=pytest.fail) == cells
    report = (tmp_path / "choices.md").read_text()
    assert report.count("| score random |") == 2 and "loss moves by, defaults / rescore 1" in report
