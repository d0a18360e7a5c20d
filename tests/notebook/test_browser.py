"""The explorer as a reader meets it: in JupyterLab, and as a page, in a headless Chromium.

Screenshots lie in pytest's temporary folder (``--basetemp`` names another).
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from notebook_files import FOLDER, code_cells, read
from PIL import Image

from bitstack_nb import load_results
from bitstack_nb.notebook.lock_view import LockView

ROOT = FOLDER.parent
NOTEBOOK = "04_mask_visualization.ipynb"
PAGE, ABLATION = ROOT / "docs" / "explorer.html", ROOT / "results" / "ablation"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SETTINGS = {  # of JupyterLab, so that it asks nothing and looks nothing up
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
if CHROMIUM is None and "CI" not in os.environ:
    pytest.skip("no chromium or google-chrome is installed", allow_module_level=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def address(tmp_path):
    """A JupyterLab that serves a copy of the notebook, beside links to what it needs."""
    (tmp_path / "notebooks").mkdir()
    for name in ("bitstack_nb", "results", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = read(FOLDER / NOTEBOOK)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    (tmp_path / "notebooks" / NOTEBOOK).write_text(json.dumps(notebook))
    for name, values in SETTINGS.items():
        file = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    port, token = free_port(), secrets.token_hex(16)
    own = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    own |= {f"JUPYTER_{kind}_DIR": kind.lower() for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"IPYTHONDIR": "ipython", "HOME": "."}
    environment = {name: str(tmp_path / folder) for name, folder in own.items()}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={tmp_path}"]
    command += [f"--IdentityProvider.token={token}", "--LabApp.extension_manager=readonly"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env={**os.environ, **environment, "BITSTACK_PRESET": "smoke"},
        )
    try:
        wait_until_served(f"http://127.0.0.1:{port}/api/status?token={token}", server)
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/{NOTEBOOK}?token={token}"
    finally:
        server.terminate()  # it ends its kernels first
        server.wait(60)


def wait_until_served(url: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, "JupyterLab ended, see server.log"
            assert time.monotonic() < end, "JupyterLab does not answer, see server.log"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "no Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, tmp_path):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(120_000)
    yield page
    page.screenshot(path=tmp_path / "last.png", full_page=True)
    page.close()


def choose(page, menu: str, *items: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).first.click()
    for item in items:
        page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()


def test_notebook_04_in_jupyterlab(address, page):
    page.goto(address)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    choose(page, "Run", "Run All Cells")
    page.get_by_text(re.compile(r"\d% of the eligible weights are locked")).wait_for()
    assert page.locator(".jp-OutputArea-output[data-mime-type*=error]").count() == 0

    recorded = page.frame_locator("iframe >> nth=0")
    recorded.get_by_role("slider").press("ArrowRight")
    recorded.locator("#shown").get_by_text("at sparsity 13 %").wait_for()

    panel = page.locator(".widget-vbox", has=page.locator(".widget-slider")).first
    panel.locator(".noUi-handle").press("ArrowRight")
    panel.get_by_role("button", name="Retrain").click()
    panel.get_by_text(re.compile(r"sparsity 13 %.* [1-9]\d* of \d+ batches")).wait_for()
    panel.get_by_role("button", name="Stop").click()
    panel.get_by_text("stopped").wait_for()


# The page without a kernel ----------------------------------------------------------------------


@pytest.fixture
def explorer(page):
    addresses, errors = [], []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(PAGE.as_uri())
    yield page
    assert errors == []
    assert [a for a in addresses if not a.startswith(("data:", "blob:"))] == [PAGE.as_uri()]


CHOICES = ((12, "union", 0), (40, "fresh", 2), (7, "recall", 3), (3, "fresh", 1))


def test_the_page_shows_the_numbers_of_the_recorded_locks(explorer):
    view = LockView.of_result(next(run for run in load_results(ABLATION) if is_shown(run)))
    for level, mode, task in CHOICES:
        budget = "union" if mode == "recall" else mode
        explorer.get_by_role("slider").fill(str(level))
        explorer.get_by_role("combobox", name="method").select_option(mode)
        explorer.get_by_role("combobox", name="task").select_option(str(task))
        table = view.curves.layer_table(level / 100, budget)
        numbers = table.groupby("task")[["selected", "added", "locked", "eligible"]].sum()
        last, what = (task, "selected") if task else (len(numbers), "locked")
        own = table[table["task"] == last]
        cells = explorer.locator("#heatmap text[pointer-events]").all_text_contents()
        expected = (100 * own[what] / own["eligible"]).to_list()
        assert list(map(float, cells)) == pytest.approx(expected, abs=0.56)
        percent = (100 * numbers.div(numbers["eligible"], axis=0)).map("{:.1f} %".format)
        assert f": {percent[what][last]} of the" in explorer.locator("#shown").inner_text()
        rows = [row.locator("td") for row in explorer.locator("#tasks tbody tr").all()]
        shown = [row.all_text_contents()[:3] for row in rows]
        assert shown == percent[["selected", "added", "locked"]].to_numpy().tolist()


def is_shown(run) -> bool:
    return (run.protocol.get("budget"), run.protocol.get("sparsity")) == ("union", 0.12)


def test_the_page_is_used_by_keyboard_and_pointer(explorer):
    slider, cell = explorer.get_by_role("slider"), explorer.locator("#cell")
    for step in range(13, 16):
        slider.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext") == f"{step} %"
        assert f"sparsity {step} %" in explorer.locator("#shown").inner_text()
    marker = explorer.locator("#accuracy .marker")
    before = float(marker.get_attribute("x1"))
    slider.press("End")
    assert float(marker.get_attribute("x1")) > before
    assert "layer 0, attention.self.query" in cell.inner_text()
    explorer.get_by_role("img", name="Heatmap").press("ArrowDown")
    assert "layer 1, attention.self.query" in cell.inner_text()
    explorer.locator("#heatmap rect[data-cell]").last.hover()
    assert "outside the layers, bert.pooler.dense" in cell.inner_text()
    for name in ("Average accuracy", "Forgetting"):
        assert "at 40 %" in explorer.get_by_role("img", name=name).get_attribute("aria-label")


def test_the_page_redraws_within_50_ms(explorer):
    times = explorer.evaluate(
        """() => [...Array(51).keys()].map((level) => {
            const slider = document.getElementById("sparsity"), start = performance.now();
            slider.value = level;
            slider.dispatchEvent(new Event("input"));
            document.body.getBoundingClientRect();
            return performance.now() - start;
        })"""
    )
    assert sorted(times)[25] < 50


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_light_or_dark_and_its_texts_stand_out(explorer, scheme, tmp_path):
    explorer.emulate_media(color_scheme=scheme)
    explorer.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
    colours = explorer.evaluate(
        """() => ["body", ".soft", "#accuracy text", "#tasks td"].map((place) => {
            const look = getComputedStyle(document.querySelector(place));
            return place === "body" ? look.backgroundColor : look.color;
        })"""
    )
    page, *texts = (luminance(colour) for colour in colours)
    assert (page > 0.5) == (scheme == "light")
    for text in texts:
        low, high = sorted((page, text))
        assert (high + 0.05) / (low + 0.05) > 4.5  # contrast as WCAG AA asks for


def luminance(colour: str) -> float:
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [s / 12.92 if s <= 0.04 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_exports_a_picture_and_a_table(explorer, tmp_path):
    saved = {}
    for kind in ("PNG", "CSV"):
        with explorer.expect_download() as download:
            explorer.get_by_role("button", name=kind).click()
        assert download.value.suggested_filename == f"locks-union-12-all.{kind.lower()}"
        saved[kind] = tmp_path / f"export.{kind}"
        download.value.save_as(saved[kind])
    head, *rows = saved["CSV"].read_text().splitlines()
    assert head == "layer,module,eligible,percent_locked"
    assert len(rows) == explorer.locator("#heatmap rect[data-cell]").count()
    picture = Image.open(saved["PNG"]).convert("RGB")
    assert picture.getpixel((1, 1)) == (255, 255, 255) and len(picture.getcolors(1 << 20)) > 50
