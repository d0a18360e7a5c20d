"""Notebook 04 as a reader meets it: JupyterLab and a headless Chromium.

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

ROOT = FOLDER.parent
NOTEBOOK = "04_mask_visualization.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SETTINGS = {  # of JupyterLab, so that it asks nothing and looks nothing up
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# Notes when a key went down in the page, when the picture had another source and was loaded, and
# when the numbers had changed, in milliseconds of the page's clock.
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


@pytest.fixture
def page(address, tmp_path):
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "no Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(address)
        yield page
        page.screenshot(path=tmp_path / "last.png")
        browser.close()


def choose(page, menu: str, *items: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).first.click()
    for item in items:
        page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()


def test_notebook_04_in_jupyterlab(page, tmp_path):
    from playwright.sync_api import expect

    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    choose(page, "Run", "Run All Cells")
    page.get_by_text(re.compile(r"\d% of the eligible weights are locked")).wait_for()
    assert page.locator(".jp-OutputArea-output[data-mime-type*=error]").count() == 0

    explorer = page.locator(".widget-vbox", has=page.locator(".widget-slider")).first
    explorer.scroll_into_view_if_needed()
    image, numbers = explorer.locator("img"), explorer.locator(".widget-html-content").first
    numbers.get_by_text("at sparsity 12 %, budget union").wait_for()
    before = image.screenshot(path=tmp_path / "sparsity-12.png")
    for step in range(13, 22):
        explorer.locator(".noUi-handle").press("ArrowRight")
        numbers.get_by_text(f"at sparsity {step} %, budget union").wait_for()
    assert image.screenshot() != before
    drag(page, explorer.locator(".noUi-handle"), 80)
    expect(numbers).not_to_contain_text("at sparsity 21 %")
    for control, choice, said in (
        ("task", "dbpedia", "dbpedia at sparsity"),
        ("budget", "fresh", "budget fresh"),
    ):
        menu = explorer.locator(".widget-dropdown", has_text=control).locator("select")
        menu.select_option(choice)
        numbers.get_by_text(said).wait_for()

    explorer.get_by_role("button", name="Retrain").click()
    explorer.get_by_text(re.compile(r"[1-9]\d* of \d+ batches")).wait_for()
    explorer.get_by_role("button", name="Stop").click()
    explorer.get_by_text("stopped").wait_for()


def drag(page, handle, by: int) -> None:
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by, y, steps=8)
    page.mouse.up()
