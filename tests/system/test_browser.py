"""The explorer as people use it: JupyterLab is started, the notebook run, a slider moved with the keyboard, and the
picture must change. Screenshots are left in build/browser/."""
import os
import re
from pathlib import Path

import pytest
from browser_lab import TimeoutError, expect, jupyter_lab, missing, page

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT/"build"/"browser"
WHY_NOT = missing() or ("" if os.environ.get("CTM_BROWSER") else "CTM_BROWSER is not set: `make browser` runs these")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The explorer's notebook, run in JupyterLab."
    import nbformat  # takes seconds
    folder, home = tmp_path_factory.mktemp("nbs"), tmp_path_factory.mktemp("home")
    (folder/"8_explore").mkdir()
    nb = nbformat.read(ROOT/"nbs"/"8_explore/01_explorer.ipynb", as_version=4)
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nb.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for c in nb.cells:
        if c.cell_type == "code": c.outputs = []
    nbformat.write(nb, folder/"8_explore/01_explorer.ipynb")  # not beside runs/: a tiny network is trained
    SHOTS.mkdir(parents=True, exist_ok=True)
    with jupyter_lab(folder, home) as address, page() as p:
        try:
            p.goto(f"{address}/doc/tree/8_explore/01_explorer.ipynb", timeout=120_000)
            idle(p)
            run_all(p)
            p.locator(".jp-OutputArea .widget-slider").first.wait_for(timeout=240_000)
            last = p.locator(".jp-OutputArea .widget-slider .noUi-handle").nth(10)
            last.wait_for(timeout=200_000, state="attached")
            idle(p)
            yield p
        finally: p.screenshot(path=SHOTS/"last.png")


def choose_kernel(p, wait=8_000):
    "JupyterLab asks which kernel where it has not yet heard of one."
    try: p.locator(".jp-Dialog").get_by_role("button", name=re.compile("^Select")).click(timeout=wait)
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
    row = p.locator(".widget-hslider", has=p.locator(".widget-label", has_text=re.compile(f"^{label}$"))).nth(which)
    row.scroll_into_view_if_needed(timeout=60_000)
    slider = row.locator(".noUi-handle").first
    box = row.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' jp-OutputArea-output ')][1]")
    return box, slider, box.locator("img").first


def idle(p): p.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(timeout=300_000)


def moved(p, slider, picture, key, times=1):
    "The picture's words before and after a key on the slider; fails if the picture stays the same for a minute."
    before, words = picture.get_attribute("src"), picture.get_attribute("alt")
    slider.focus()
    for _ in range(times): slider.press(key)
    expect(picture).not_to_have_attribute("src", before, timeout=60_000)
    idle(p)
    after = picture.get_attribute("src")
    assert after != before and after.startswith("data:image/png;base64,") and len(after) > 5_000
    return words, picture.get_attribute("alt")


@pytest.mark.parametrize("label", ["s"])
def test_an_arrow_key_changes_the_plane(lab, label):
    box, slider, picture = explorer(lab, label)
    before, after = moved(lab, slider, picture, "ArrowRight", 5)
    assert before.startswith("One jump") and after.startswith("One jump")
    assert before != after
    box.screenshot(path=SHOTS/f"plane_{label}.png")


def test_an_arrow_key_changes_the_pictures(lab):
    box, slider, picture = explorer(lab, "steps", 1)
    moved(lab, slider, picture, "ArrowLeft")
    expect(box.get_by_role("status").first).to_contain_text("teacher, NFE 35", timeout=60_000)
    box.screenshot(path=SHOTS/"pictures.png")


def test_a_stroke_on_the_canvas_is_answered_while_it_is_drawn(lab):
    canvas = lab.locator("canvas").first
    canvas.scroll_into_view_if_needed(timeout=60_000)
    box = canvas.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' jp-OutputArea-output ')][1]")
    picture, place = box.locator("img").first, canvas.bounding_box()
    idle(lab)
    before = picture.get_attribute("src")
    lab.mouse.move(place["x"] + 90, place["y"] + 40)
    lab.mouse.down()
    lab.mouse.move(place["x"] + 100, place["y"] + 150, steps=8)
    expect(picture).not_to_have_attribute("src", before, timeout=60_000)  # the pen is still down
    lab.mouse.up()
    idle(lab)
    box.screenshot(path=SHOTS/"stroke.png")


def test_a_screen_reader_is_told_name_and_value(lab):
    rows = lab.locator(".widget-hslider").all()
    handles = [row.locator(".noUi-handle").first for row in rows]
    labels, values = ([row.locator(k).inner_text() for row in rows] for k in (".widget-label", ".widget-readout"))
    names, spoken = ([h.get_attribute(k) or "" for h in handles] for k in ("aria-label", "aria-valuetext"))
    assert len(rows) >= 8 and all(labels) and all(names), (labels, names)
    assert spoken == values
    s = lab.get_by_role("slider", name=re.compile("^s: noise level")).first
    expect(s).to_be_visible()
    s.press("ArrowLeft")
    idle(lab)
    readout = lab.locator(".widget-hslider", has=s).locator(".widget-readout")
    expect(s).to_have_attribute("aria-valuetext", readout.inner_text())


def test_no_cell_failed(lab):
    assert lab.locator("[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg").count() == 0
