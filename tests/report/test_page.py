import json
import re
from html.parser import HTMLParser

import pytest

from hf_tokenseek.report import page, require_extra
from hf_tokenseek.report.page import names_of, render, write_page
from hf_tokenseek.report.record import RunRecord, read_run
from tests.report.records import EVIL, events, write

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in its turn; keeps elements, and text by the path to it."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, text):
        self.texts.append((tuple(self._open), text))

    def all(self, tag, **attributes):
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [own for name, own in self.elements if name == tag and wanted.items() <= own.items()]

    def text(self, tag):
        return "".join(text for path, text in self.texts if tag in path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of a run with everything."""
    folder = tmp_path_factory.mktemp("whole")
    return write_page([write(folder / "run")], folder / "out" / "report.html").read_text()


def test_the_page_is_well_formed_and_its_ids_are_unique(whole):
    found = Page(whole)
    ids = [own["id"] for _, own in found.elements if "id" in own]
    assert len(ids) == len(set(ids))
    references = [
        name
        for _, own in found.elements
        for key in ("aria-labelledby", "aria-describedby")
        for name in own.get(key, "").split()
    ]
    assert references and set(references) <= set(ids)
    links = [own["href"] for _, own in found.elements if own.get("href", "").startswith("#")]
    assert links and {link[1:] for link in links} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", whole)) <= set(ids)


def test_the_page_asks_for_nothing_from_outside(whole):
    found = Page(whole)
    for tag, own in found.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img", "image")
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert re.match(r"#|data:,$|$", own.get(name, "")), (tag, own[name])
    assert not re.search(r"url\((?!#)", whole)
    assert "@import" not in whole


def test_what_a_run_says_is_text_and_never_markup(whole):
    found = Page(whole)
    assert EVIL in "".join(text for _, text in found.texts)
    assert EVIL in [text for path, text in found.texts if "td" in path]
    assert len(found.all("script")) == 1 and "owned" not in found.text("script")
    assert not any("onerror" in own for _, own in found.elements)
    # and the readout gets it from the token itself
    assert whole.count("document.title = ") == whole.count("&lt;script&gt;document.title = ")


def test_a_name_of_a_run_is_text_too():
    logs = [{"loss": 1.0 + step, "step": step} for step in (1, 2)]
    found = Page(render([RunRecord(EVIL, logs=logs), RunRecord("_$x^$", logs=logs)]))
    assert EVIL in found.text("h1") and EVIL in found.text("title")
    legend = {text.strip() for path, text in found.texts if "svg" in path}
    assert {f"{EVIL[:24]}…{EVIL[-24:]}", "_$x^$"} <= legend
    assert len(found.all("script")) == 1


def test_the_token_map_can_be_reached_and_is_named(whole):
    found = Page(whole)
    maps = found.all("div", role="listbox")
    assert [own["aria-label"] for own in maps] == ["Tokens of sample 1 of run", "Tokens of sample 2 of run"]
    for own in maps:
        assert own["tabindex"] == "0" and own["aria-multiselectable"] == "true"
        details = json.loads(own["data-details"])
        assert len(details["columns"]) == len(details["names"]) == 3
        assert all(len(column) == 8 for column in details["columns"])
    options = found.all("span", role="option")
    assert len(options) == 16
    assert [own["aria-selected"] == "true" for own in options[:8]] == [kind != "0" for kind in "10010220"]
    assert [int(own["data-place"]) for own in options[:8]] == list(range(8))
    assert len(found.all("p", aria_live="polite")) == 2


def test_every_figure_has_a_title_and_a_description(whole):
    found = Page(whole)
    figures = found.all("svg", role="img")
    assert len(figures) == len(found.all("figure")) > 10
    ids = {own["id"] for tag, own in found.elements if tag in ("title", "desc") and "id" in own}
    for own in figures:
        assert set(own["aria-labelledby"].split()) <= ids
    said = found.text("desc")
    assert "3.5 loss at optimizer step 0, 2.5 at 4" in said
    assert "10 ditched, 4 evidence, 6 loss" in said
    assert "saved: 6 MiB in all, at most 3." in said
    assert "run: 64 MiB in all, at most 50.run: 130 MiB in all, at most 70." in said
    # no colour that the page cannot change
    assert not re.search(r"(fill|stroke): #", whole)


def test_the_head_serves_phones_and_dark_rooms(whole):
    found = Page(whole)
    assert found.all("meta", name="viewport", content="width=device-width, initial-scale=1")
    assert found.all("html", lang="en")
    assert "@media (prefers-color-scheme: dark)" in found.text("style")


def test_what_was_not_recorded_is_said(tmp_path):
    state = tmp_path / "plain" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text(
        json.dumps(
            {"log_history": [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}, {"eval_loss": 1.5, "step": 2}]}
        )
    )
    found = Page(write_page([state.parent], tmp_path / "report.html").read_text())
    said = found.text("p")
    assert "Held-out loss: a single value, plain 1.5 at optimizer step 2." in said
    assert "Saved activations, largest micro-batch: not recorded (MemoryCallback was not in the run" in said
    assert "Overlap between visits: not recorded (no sample was followed)." in said
    assert "Not recorded: sparse tuning was off." in said
    assert "Not recorded: LeMo was off." in said
    assert "Not recorded: no sequence was followed." in said
    assert "Not recorded: ReportCallback was not in the run." in said
    assert 'Memory of each layer: not recorded (MemoryCallback(level="layer") tracks it).' in said
    assert 'The largest moment, by kind: not recorded (MemoryCallback(level="layer")' in said
    assert len(found.all("svg")) == 1


def test_an_empty_run_is_an_honest_page():
    found = Page(render([RunRecord("empty")]))
    assert "Nothing has been logged yet." in found.text("p")
    assert not found.all("svg")


def test_one_visit_each_has_no_overlap_yet():
    once = [event for event in events() if event["kind"] != "visit" or event["step"] < 3]
    run = RunRecord("run")
    for event in once:
        run.add(event)
    assert "Overlap between visits: none yet" in Page(render([run])).text("p")


def test_runs_are_compared(tmp_path):
    slow = [e for e in events(learning_rate=2e-4) if e["kind"] not in ("draw", "grid", "visit", "sample")]
    folders = [write(tmp_path / "a" / "fast"), write(tmp_path / "a" / "slow", slow)]
    text = write_page(folders, tmp_path / "report.html").read_text()
    found = Page(text)
    assert "fast: 4 loss at optimizer step 1" in found.text("desc") and "slow: 4 loss" in found.text("desc")
    differing = text[text.index("What differs") : text.index("All settings")]
    assert "arguments.learning_rate" in differing and "0.0002" in differing
    assert "max_steps" not in differing and "max_steps" in text
    assert text.count("Not recorded: no sequence was followed.") == 1
    rows = re.findall(r'<tr class="differs"><th scope="row">([^<]+)', differing)
    assert rows == ["arguments.learning_rate"]


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "b"]) == ["a", "b"]
    assert names_of([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert names_of([tmp_path, tmp_path]) == [f"{tmp_path.name} (1)", f"{tmp_path.name} (2)"]


def test_the_summary_has_what_was_logged(tmp_path):
    rows = {row.name: row.cells for row in page.summary([read_run(write(tmp_path))])}
    assert rows["optimizer steps"] == ["4"]
    assert rows["held-out loss, first"] == ["3.5"] and rows["held-out loss, last"] == ["2.5"]
    assert rows["saved activations, largest [MiB]"] == ["40"]
    assert "tokens per second, median" not in rows


def test_settings_are_flat_and_counts_readable(tmp_path):
    rows = {row.name: row.cells for row in page.settings([read_run(write(tmp_path))])}
    assert rows["methods.seek.context"] == ["0.1"]
    assert rows["model.parameters"] == ["134\u202f515\u202f008"]
    assert "kind" not in rows


def test_a_missing_package_is_named_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_tokenseek.report.find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(
        ModuleNotFoundError, match=r"jinja2 cannot be found. Run `pip install 'hf_tokenseek\[report\]'`"
    ) as caught:
        require_extra()
    assert caught.value.name == "jinja2"
    with pytest.raises(ModuleNotFoundError, match="jinja2"):
        write_page([write(tmp_path)], tmp_path / "report.html")
