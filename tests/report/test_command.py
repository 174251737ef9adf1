import pytest

from hf_tokenseek.cli import main
from tests.report.records import events, log, write

pytest.importorskip("matplotlib")

SHORT = [events()[0], log(1, loss=2.0), log(2, loss=1.0)]


def test_one_run_gets_its_page_into_its_folder(tmp_path, capsys):
    run = write(tmp_path / "run", SHORT)
    main(["report", str(run)])
    assert capsys.readouterr().out == f"Written to {run / 'report.html'}.\n"
    assert "<h1>run</h1>" in (run / "report.html").read_text()
    assert not list(run.glob("*.tmp"))


def test_several_runs_are_compared_where_one_stands_or_asks_for_it(tmp_path, monkeypatch):
    runs = [str(write(tmp_path / name, SHORT)) for name in ("first", "second")]
    monkeypatch.chdir(tmp_path)
    main(["report", *runs])
    assert "2 runs side by side" in (tmp_path / "report.html").read_text()
    main(["report", *runs, "--output", "deep/er/compare.html"])
    assert (tmp_path / "deep" / "er" / "compare.html").is_file()


def test_mistakes_end_with_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-tokenseek: error: ") and "nowhere' has neither report.jsonl" in line


def test_help_names_the_subcommand(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "report" in capsys.readouterr().out
