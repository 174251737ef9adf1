import pytest


@pytest.fixture
def bench(script):
    return script("bench_memory")


@pytest.fixture
def ways(script):
    return script("bench_rows")


def test_fake_bytes_are_real_bytes_in_every_row(bench, capsys):
    assert bench.main(["--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all("fake equals real" in line for line in lines)


def test_autograd_sees_what_forward_keeps_and_seek_saves_what_its_limit_says(bench, ways):
    # wide enough that the rounding of small storages does not matter
    sizes = {**bench.LLAMA_1B, "vocab_size": 2048, "num_hidden_layers": 2}
    rows = bench.measure_rows(sizes, 1, 1024, "evidence")
    for row in rows.values():
        # only the positions' cos and sin, in the closure of checkpointing, are alive without being saved
        assert row["saved_bytes"] == pytest.approx(row["alive_bytes"], rel=0.02)
    for name in (ways.SEEK_10, ways.SEEK_10_CHECKPOINTING, ways.SEEK_10_LEAN):
        assert rows[name]["saved_bytes"] == pytest.approx(rows[name]["limit_bytes"], rel=0.01)
        assert rows[name]["share"] == pytest.approx(0.1, abs=1e-3)


def test_bars_and_table(bench, ways):
    gib = bench.GIB
    row = {"saved_bytes": gib, "alive_bytes": gib, "peak_bytes": 2 * gib, "inside_bytes": 0, "gradient_bytes": gib}
    seek = {**row, "saved_bytes": gib // 8, "alive_bytes": gib // 4, "share": 0.1, "limit_bytes": gib // 8}
    rows = {ways.PLAIN.name: row, ways.CHUNKED.name: row, ways.LEAN_CHUNKED.name: {**row, "saved_bytes": 3 * gib // 4}}
    rows |= dict.fromkeys((ways.SEEK_10, ways.SEEK_10_CHECKPOINTING, ways.SEEK_10_LEAN), seek)
    found = bench.bars({bench.BARS_AT: rows})
    assert [bar.value for bar in found] == [0.125, 0.125, 0.75, 0.125, 0.5]
    assert not any(bar.passed for bar in found)
    assert [bar.value for bar in bench.bars({"1 x 4096": rows})] == [0.5]
    assert f"| {ways.SEEK_10} | 0.100 | 0.1250 | 0.1250 | 0.1250 | 0.2500 | 2.000 | 1.000 | 0.0 |" in bench.table(rows)
