"""The explorer as people use it: JupyterLab is started, the notebook run, a slider moved with the keyboard, and the picture must change. Screenshots are left in build/browser/."""
import re
from pathlib import Path

import nbformat
import pytest
from browser_lab import TimeoutError, jupyter_lab, missing, page

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT/"build"/"browser"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The explorer's notebook, run in JupyterLab."
    folder, home = tmp_path_factory.mktemp("nbs"), tmp_path_factory.mktemp("home")
    nb = nbformat.read(ROOT/"nbs"/"15_explorer.ipynb", as_version=4)
    nb.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}, "language_info": {"name": "python"}}
    for c in nb.cells:
        if c.cell_type == "code": c.outputs = []
    nbformat.write(nb, folder/"15_explorer.ipynb")  # not beside runs/: the tiny network is trained, whatever this machine has
    SHOTS.mkdir(parents=True, exist_ok=True)
    with jupyter_lab(folder, home) as address, page() as p:
        try:
            p.goto(f"{address}/lab/tree/15_explorer.ipynb", timeout=120_000)
            p.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(timeout=120_000)
            run_all(p)
            p.locator(".jp-OutputArea .widget-slider").first.wait_for(timeout=240_000)
            p.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(timeout=300_000)
            yield p
        finally: p.screenshot(path=SHOTS/"last.png")


def choose_kernel(p, wait=8_000):
    "JupyterLab asks which kernel where it has not yet heard of one."
    try: p.get_by_role("button", name=re.compile("^Select")).click(timeout=wait)
    except TimeoutError: pass


def run_all(p):
    "Run > Run All Cells, until the cells are being run."
    for _ in range(3):
        choose_kernel(p, 3_000)
        p.get_by_role("menuitem", name="Run", exact=True).click(timeout=60_000)
        p.get_by_role("menuitem", name=re.compile("^Run All( Cells)?$")).click(timeout=60_000)
        choose_kernel(p)
        try: return p.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\*|\d+)\]")).first.wait_for(timeout=15_000)
        except TimeoutError: continue
    raise AssertionError("Run All Cells ran nothing")


def explorer(p, label, which=0):
    "The output that holds the slider of this label, the slider, and its picture."
    row = p.locator(".widget-hslider", has=p.locator(".widget-label", has_text=label)).nth(which)
    row.scroll_into_view_if_needed(timeout=60_000)
    slider = row.locator(".noUi-handle").first
    box = p.locator(".jp-OutputArea-output", has=row).last
    return box, slider, box.locator("img").first


def moved(p, picture, press):
    "The picture's bytes before and after a key; fails if they stay the same for 20 s."
    before = picture.get_attribute("src")
    press()
    p.wait_for_function("([e, old]) => e.getAttribute('src') !== old", arg=[picture.element_handle(), before], timeout=20_000)
    return before, picture.get_attribute("src")


@pytest.mark.parametrize("label, key", [("^s$", "ArrowRight"), ("^seed$", "ArrowRight")])
def test_a_key_on_a_slider_changes_the_plane(lab, label, key):
    box, slider, picture = explorer(lab, re.compile(label))
    alt = picture.get_attribute("alt")
    def press():
        slider.focus()
        for _ in range(5): slider.press(key)
    before, after = moved(lab, picture, press)
    assert before.startswith("data:image/png;base64,") and after.startswith("data:image/png;base64,") and len(after) > 20_000
    assert alt.startswith("One jump") and picture.get_attribute("alt") != alt
    box.screenshot(path=SHOTS/"plane.png")


def test_a_key_on_a_slider_changes_the_pictures(lab):
    box, slider, picture = explorer(lab, re.compile("^steps$"), 1)
    moved(lab, picture, lambda: (slider.focus(), slider.press("ArrowLeft")))
    assert "teacher, 35 evaluations" in box.get_by_role("status").inner_text()
    box.screenshot(path=SHOTS/"pictures.png")


def test_a_run_is_shown_with_its_curves(lab):
    box, slider, picture = explorer(lab, re.compile("^samples at$"))
    assert box.locator("svg").count() >= 4
    moved(lab, picture, lambda: (slider.focus(), slider.press("ArrowLeft")))
    box.screenshot(path=SHOTS/"run.png")


def test_no_cell_failed_and_every_slider_has_a_label(lab):
    assert lab.locator("[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg").count() == 0
    labels = [row.locator(".widget-label").inner_text() for row in lab.locator(".widget-hslider").all()]
    assert len(labels) >= 8 and all(labels), labels
