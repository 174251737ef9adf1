"""The page in a real browser: no errors, nothing that was a prompt runs, the token map answers to keys and pointer."""

import html
import re
import shutil
import subprocess

import pytest

from hf_tokenseek.report.page import write_page
from tests.report.records import EVIL, write

pytest.importorskip("matplotlib")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser found, looked for {', '.join(NAMES)}")

# written behind the page's own script
ACTIONS = """
<script>
const map = document.querySelector(".tokens"), readout = map.nextElementSibling, said = [];
const press = (key) => map.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
map.focus();
// a window that is not in front gives no event
if (!document.hasFocus()) map.dispatchEvent(new FocusEvent("focus"));
said.push(readout.textContent, document.activeElement === map);
press("ArrowRight"); press("ArrowRight"); press("ArrowRight");
said.push(readout.textContent, document.getElementById(map.getAttribute("aria-activedescendant")).dataset.place);
press("End"); said.push(readout.textContent);
press("ArrowDown"); press("Home"); press("ArrowLeft"); said.push(readout.textContent);
map.children[5].dispatchEvent(new MouseEvent("mouseover", { bubbles: true })); said.push(readout.textContent);
said.push(document.documentElement.scrollWidth <= window.innerWidth);
const result = document.createElement("pre");
result.id = "result"; result.textContent = said.join("\\n"); document.body.append(result);
</script>
"""


def visit(page, tmp_path, *options):
    """The page's elements and what the console said."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    return write_page([write(folder / "run")], folder / "report.html")


def test_the_page_opens_without_a_word_on_the_console(page, tmp_path):
    elements, console = visit(page, tmp_path)
    assert console == []
    assert "<title>run – training report</title>" in elements  # and not "owned"


@pytest.mark.parametrize("width", [375, 1300])
def test_keys_and_pointer_show_the_terms(page, tmp_path, width):
    acted = page.with_name(f"acted-{width}.html")
    acted.write_text(page.read_text().replace("</body>", f"{ACTIONS}</body>"))
    elements, console = visit(acted, tmp_path, f"--window-size={width},900")
    assert console == []
    said = html.unescape(re.search(r'<pre id="result">(.*?)</pre>', elements, re.DOTALL).group(1))
    lines = said.split("\n")
    first = "“A” · position 0 (of 8 tokens) · evidence · score 0.5 (rank 2) · attention mass 1 · loss 0.01"
    first += " · selected in 2 of 2 visit(s)"
    assert lines[:2] == [first, "true"]
    assert lines[2] == (
        f"“{EVIL}” · position 3 (of 8 tokens) · evidence · score 8 (rank 1) · attention mass 16 · loss 0.0625"
        " · selected in 1 of 2 visit(s)"
    )
    assert lines[3] == "3"
    assert lines[4].startswith("“&lt;b&gt;” · position 7 (of 8 tokens) · ditched")
    assert lines[5] == first
    assert lines[6].startswith("“'quoted\"” · position 5 (of 8 tokens) · loss · ")
    assert lines[7] == "true", "the page is wider than the window"
