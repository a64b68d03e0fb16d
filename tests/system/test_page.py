"""The page of `ctm_nb_convert --web`, opened from a file in a browser without a network. Its picture is left in
build/browser/."""
import os
from pathlib import Path

import pytest
from browser_lab import missing, page

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "build" / "browser"
WHY_NOT = missing() or ("" if os.environ.get("CTM_BROWSER") else "CTM_BROWSER is not set: `make browser` runs these")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
pytest.importorskip("onnxscript")


def test_a_double_click_draws(tmp_path):
    from ctm_nb.checkpoints.catalogue import DownloadError, fetch
    from ctm_nb.commands.convert import ctm_nb_convert
    try: fetch("onnxruntime-web")
    except DownloadError as e: pytest.skip(str(e))
    ctm_nb_convert([str(ROOT / "nbs/results/emoji/student.safetensors"), "--web", str(tmp_path / "page")])
    faults, asked = [], []
    SHOTS.mkdir(parents=True, exist_ok=True)
    with page() as p:
        p.context.set_offline(True)
        p.on("pageerror", lambda e: faults.append(str(e)))
        p.on("request", lambda r: asked.append(r.url))
        p.goto((tmp_path / "page" / "index.html").as_uri())
        p.locator("#draw:enabled").wait_for(timeout=300_000)
        pixels = "document.querySelector('canvas').toDataURL()"
        first = p.evaluate(pixels)
        p.locator("#next").click()
        p.wait_for_function("document.querySelector('#status').textContent.startsWith('seed 1:')", timeout=120_000)
        second = p.evaluate(pixels)
        p.locator("#seed").fill("0")
        p.locator("#draw").click()
        p.wait_for_function("document.querySelector('#status').textContent.startsWith('seed 0:')", timeout=120_000)
        assert p.evaluate(pixels) == first != second
        p.screenshot(path=SHOTS / "page.png")
    assert not faults and all(u.startswith(("file:", "blob:")) for u in asked)
