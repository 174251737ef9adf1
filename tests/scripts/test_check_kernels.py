import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")

TOYS = "tests.scripts.toy_kernels"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture
def gate(script):
    return script("check_kernels")


@pytest.fixture
def rules(script):
    return script("kernel_gate.rules")


@pytest.fixture
def toys():
    from tests.scripts import toy_kernels

    return toy_kernels


@pytest.fixture
def build(script):
    from tokenseek_kernels.compilation import TARGETS

    inner = script("kernel_gate.build").build
    return lambda compilation, target="sm_80", aligned=True: inner(compilation, TARGETS[target], aligned)


def row_of(script, **changes):
    figures = {"kernel": "toy", "target": "sm_80", "aligned": True, "matmul": False, "registers": 32, "shared": 0}
    return script("kernel_gate.build").Row(**{**figures, **changes})


def everything(kernel, variant):
    return True


def test_a_good_kernel_passes_and_its_alignment_shows(build, rules, toys):
    aligned, unaligned = build(toys.FINE), build(toys.FINE, aligned=False)
    for row in (aligned, unaligned):
        assert rules.fixed_breaches(row) == []
        assert row.matrix > 0
        assert 0 < row.registers <= 255
    # without alignment nothing is copied asynchronously into several stages
    assert unaligned.shared < aligned.shared


def test_an_amd_kernel_is_read_as_well(build, rules, toys):
    row = build(toys.FINE, "gfx942")
    assert rules.fixed_breaches(row) == []
    assert row.registers > 0
    assert row.matrix > 0


@pytest.mark.parametrize(
    ("toy", "fragment"),
    [
        ("SPILLS", "spills registers ("),
        ("TOO_MUCH_SHARED", "bytes of shared memory, the target has 166912"),
        ("NO_TENSOR_CORE", "a matrix product without a tensor-core instruction"),
        ("INCOMPLETE", "does not compile: ValueError: `types` and `constants` leave out ['n']"),
    ],
)
def test_each_fixed_rule_is_noticed(build, rules, toys, toy, fragment):
    (line,) = rules.fixed_breaches(build(getattr(toys, toy)))
    assert line.startswith(f"{getattr(toys, toy).name}, sm_80 aligned: ")
    assert fragment in line


def test_an_amd_spill_is_read_from_the_code(script, rules):
    code = """
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    .private_segment_fixed_size: 2596
    .vgpr_count:     512
    .vgpr_spill_count: 924
"""
    figures = script("kernel_gate.build")._read_amd(SimpleNamespace(asm={"amdgcn": code}))
    assert figures == {"registers": 512, "stack": 2596, "spills": 924, "matrix": 1}
    (line,) = rules.fixed_breaches(row_of(script, target="gfx942", **figures))
    assert "spills registers (2596 bytes of stack, 924 loads and stores)" in line


def test_budgets(rules, script):
    row = row_of(script)
    budgets = rules.Budgets("3.9.0", {})
    assert budgets.breaches([row], "3.9.0", everything) == ["toy, sm_80 aligned: has no budget"]
    budgets.update([row], "3.9.0", everything)
    assert budgets.breaches([row], "3.9.0", everything) == []
    fatter = row_of(script, registers=33, shared=16)
    assert budgets.breaches([fatter], "3.9.0", everything) == [
        "toy, sm_80 aligned: 33 registers, 32 in the budget",
        "toy, sm_80 aligned: 16 bytes of shared memory, 0 in the budget",
    ]
    # another Triton allocates differently
    assert budgets.breaches([fatter], "3.8.0", everything) == []
    # what breaks a fixed rule gets no budget
    budgets.update([row_of(script, stack=8)], "3.9.0", everything)
    assert budgets.rows == {}


def test_the_same_code_is_recalled_and_nothing_else(rules, script):
    known = row_of(script, code="a", matrix=3)
    budgets = rules.Budgets("3.9.0", {})
    budgets.update([known], "3.9.0", everything)
    assert budgets.recall(row_of(script, code="a", registers=0), "3.9.0") == known
    assert budgets.recall(row_of(script, code="b"), "3.9.0") is None
    assert budgets.recall(row_of(script, code="a"), "3.8.0") is None
    assert budgets.recall(row_of(script, code="a", aligned=False), "3.9.0") is None


def test_the_fingerprint_follows_everything_that_is_compiled(script, toys):
    from tokenseek_kernels.compilation import TARGETS

    of = script("kernel_gate.build").Row.of
    code = of(toys.FINE, TARGETS["sm_80"], True).code
    assert of(replace(toys.FINE, name="another name"), TARGETS["sm_80"], True).code == code
    others = [
        of(toys.FINE, TARGETS["sm_90"], True),
        of(toys.FINE, TARGETS["sm_80"], False),
        *(
            of(replace(toys.FINE, **change), TARGETS["sm_80"], True)
            for change in (
                {"kernel": toys.SPILLS.kernel},
                {"types": {**toys.FINE.types, "stride": "i64"}},
                {"constants": {"SIZE": 128}},
                {"num_warps": 8},
                {"num_stages": 2},
            )
        ),
    ]
    assert len({code, *(row.code for row in others)}) == 8


def test_budgets_of_kernels_that_are_no_more(rules, script):
    budgets = rules.Budgets("3.9.0", {})
    budgets.update([row_of(script), row_of(script, kernel="gone")], "3.9.0", everything)
    stale = "gone, sm_80 aligned: has a budget but is not compiled any more"
    assert budgets.breaches([row_of(script)], "3.9.0", everything) == [stale]
    # what was not asked for is not missed, and survives an update
    only_toy = lambda kernel, variant: kernel == "toy"  # noqa: E731
    assert budgets.breaches([row_of(script)], "3.9.0", only_toy) == []
    budgets.update([row_of(script, registers=40)], "3.9.0", only_toy)
    assert budgets.rows["gone"]["sm_80 aligned"]["registers"] == 32
    budgets.update([row_of(script)], "3.9.0", everything)
    assert list(budgets.rows) == ["toy"]
    # figures of two versions do not mix
    budgets.update([row_of(script, kernel="another")], "3.8.0", lambda kernel, variant: kernel == "another")
    assert (budgets.triton, list(budgets.rows)) == ("3.8.0", ["another"])


def test_budgets_keep_one_line_a_row(rules, script, tmp_path):
    path = tmp_path / "budgets.json"
    budgets = rules.Budgets("3.9.0", {})
    budgets.update([row_of(script), row_of(script, aligned=False), row_of(script, kernel="b")], "3.9.0", everything)
    budgets.save(path)
    again = rules.Budgets.load(path)
    assert (again.triton, again.rows) == ("3.9.0", budgets.rows)
    assert '   "sm_80 aligned": {"registers": 32, "shared": 0, "matrix": 0, "code": ""},\n' in path.read_text()
    assert rules.Budgets.load(tmp_path / "none.json").rows == {}


def test_end_to_end(gate, tmp_path, capsys):
    path, markdown = tmp_path / "budgets.json", tmp_path / "table.md"
    options = ["--targets", "sm_80", "--processes", "1", "--markdown", str(markdown)]
    fails = "FAIL  toy copy, sm_80 aligned: a matrix product without a tensor-core instruction"
    assert gate.main([*options, "--update"], [TOYS], path) == 1
    report = capsys.readouterr().out
    assert fails in report
    assert "| toy fine | sm_80 | no |" in report
    assert markdown.read_text() in report
    # the one that fails has no budget, and is compiled again; the other one is as it was
    assert gate.main([*options, "--changed"], [TOYS], path) == 1
    again = capsys.readouterr().out
    assert fails in again
    assert "toy fine" not in again
    assert "2 compiled, 2 as they were, 2 breaches" in again
    assert sorted(markdown.read_text().splitlines()) == sorted(
        report.splitlines()[: len(markdown.read_text().splitlines())]
    )


def test_what_is_above_its_budget_fails(gate, tmp_path, capsys, monkeypatch, script):
    path = tmp_path / "budgets.json"
    monkeypatch.setattr(gate, "compile_all", lambda jobs, processes: [compiled(job) for job in jobs])
    registers = 32

    def compiled(job):
        return replace(job.unknown, registers=registers, matrix=1)

    assert gate.main(["--update"], [TOYS], path) == 0
    registers = 33
    assert gate.main(["--changed"], [TOYS], path) == 0
    assert gate.main(["--kernels", "fine"], [TOYS], path) == 1
    report = capsys.readouterr().out
    assert "FAIL  toy fine, gfx942 unaligned: 33 registers, 32 in the budget\n" in report
    assert "10 compiled, 0 as they were, 10 breaches" in report


def test_one_name_stands_for_one_configuration(script, monkeypatch, toys):
    jobs = script("kernel_gate.jobs")
    monkeypatch.setattr(jobs, "listed", lambda module, target: [toys.FINE, toys.FINE])
    with pytest.raises(ValueError, match="'toy fine' is listed for sm_80 twice"):
        jobs.find_jobs([TOYS], ["sm_80"])


def test_kernels_are_found_on_disk(script):
    root = Path(__file__).resolve().parents[2] / "kernels" / "tokenseek_kernels"
    expected = sorted(f"tokenseek_kernels.{path.parent.name}.triton" for path in root.rglob("triton.py"))
    assert script("kernel_gate.jobs").kernel_modules() == expected
