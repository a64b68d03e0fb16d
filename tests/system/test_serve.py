"""The page of `ctm_nb_sample RUN --serve`: with every socket but this machine's own closed, and in a real browser.
The picture of that is left in build/browser/."""
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock
from urllib.request import Request, urlopen

import pytest
from browser_lab import free_port, missing, page
from PIL import Image

from ctm_nb.commands.sample import ctm_nb_sample
from ctm_nb.evaluation.draw import draw_samples
from ctm_nb.evaluation.serve import QUIET, draw_page
from ctm_nb.checkpoints.models import load

ROOT = Path(__file__).resolve().parents[2]
EMOJI = str(ROOT / "nbs" / "results" / "emoji" / "student.safetensors")
WHY_NOT = missing() or ("" if os.environ.get("CTM_BROWSER") else "CTM_BROWSER is not set: `make browser` runs these")
GUARD = """
import os, sys
def guard(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto"): address = args[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"): address = args
    else: return
    own = ("127.0.0.1",) if event == "socket.bind" else ("127.0.0.1", "localhost", None)
    if isinstance(address, (str, bytes)) or address[0] in own: return  # of this machine's files
    with open(os.environ["ASKED"], "a") as f: f.write(f"{event} {address}\\n")
    raise OSError(f"blocked: {event} {address}")
sys.addaudithook(guard)
"""
CODE = "from ctm_nb.commands.sample import ctm_nb_sample; ctm_nb_sample()"


@contextmanager
def served(home, *words):
    "A guarded server; yields its address, and ends it by Ctrl-C."
    pytest.importorskip("gradio")
    for name in ("guard", "tmp", "cwd"): (home / name).mkdir()
    (home / "guard" / "sitecustomize.py").write_text(GUARD)
    path = os.pathsep.join([str(home / "guard"), *filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])])
    env = {**os.environ, "PYTHONPATH": path, "ASKED": str(home / "asked"), "TMPDIR": str(home / "tmp"),
           "HTTP_PROXY": "http://192.0.2.1:9", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "true"}
    p = subprocess.Popen([sys.executable, "-c", CODE, EMOJI, "--serve", str(free_port()), *words], cwd=home / "cwd",
                         env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = p.stdout.readline()
        assert "draws at http://127.0.0.1:" in said, said + p.communicate()[1]
        yield said.split(" draws at ")[1].split(",")[0]
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=120)
    finally: p.kill()
    assert (p.returncode, out) == (0, "closed\n") and "Traceback" not in err, err
    assert not (home / "asked").exists(), (home / "asked").read_text()
    left = [*(home / "tmp").iterdir(), *(home / "cwd").iterdir()]
    assert not [f for f in left if not f.name.startswith("torchinductor_")]  # torch's own


def drawn(address, *form):
    "The picture and the words that a filled form gives."
    body = json.dumps({"data": form}).encode()
    call = f"{address}gradio_api/call/draw"
    with urlopen(Request(call, body, {"Content-Type": "application/json"})) as r: event = json.load(r)["event_id"]
    with urlopen(f"{call}/{event}") as r: text = r.read().decode()
    assert "event: complete" in text, text
    picture, said = json.loads(text.rpartition("data: ")[2])
    with urlopen(picture["url"]) as r: return r.read(), said


def test_it_draws_what_the_command_draws_and_asks_nobody(tmp_path):
    with served(tmp_path) as address:
        picture, said = drawn(address, 2, 3, 2, .3, 9, None)
        ways, also = drawn(address, "all", 0, 1, 0, 18, 1)
    name = load(EMOJI).classes[2]
    draw_samples(EMOJI, tmp_path / "own.png", 9, device="cpu", seed=3, steps=2, gamma=.3, classes=name)
    assert picture == (tmp_path / "own.png").read_bytes()
    assert said.startswith(f"`ctm_nb_sample {EMOJI} -n 9 --seed 3 --steps 2")
    assert f"--gamma 0.3 --classes {name}`: 9 pictures, 2 NFE" in said
    assert also.startswith("from seed 0 to seed 1: 18 pictures, 1 NFE")
    assert Image.open(io.BytesIO(ways)).height == 2 * 34 + 2


@pytest.mark.parametrize("words, said", [
    (["--serve", "--out", "x.png"], "--out has no meaning to --serve"),
    (["--serve", "--edit", "stroke"], "--edit has no meaning to --serve"),
    (["--serve", "--times", "80,1"], "--times has no meaning to --serve"),
    (["--serve", "70000"], "--serve must be >= 1 and <= 65535, got 70000"),
    ([], "give --out OUT, or --serve"),
    (["--serve"], "--serve needs the package gradio: pip install gradio"),
])
def test_refused_in_one_line(words, said, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as e: ctm_nb_sample([EMOJI, *words])
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1


@pytest.fixture
def gradio(monkeypatch):
    "A stand-in of its package."
    gr = MagicMock()
    gr.Error = type("Error", (Exception,), {"__init__": lambda e, text, **_: Exception.__init__(e, text)})
    gr.Interface.return_value.launch.side_effect = OSError("Cannot find empty port in range: 7891-7891")
    monkeypatch.setitem(sys.modules, "gradio", gr)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for k in (*QUIET, "GRADIO_TEMP_DIR"): monkeypatch.setenv(k, "")  # put back at the end
    return gr


def test_a_port_that_is_taken_is_a_sentence(gradio, capsys):
    with pytest.raises(SystemExit) as e: ctm_nb_sample([EMOJI, "--serve", "7891"])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.endswith(": --serve 7891: port 7891 is taken; give another, or --serve alone\n")


def test_what_a_form_can_not_mean_is_said_on_the_page(gradio, capsys):
    with pytest.raises(SystemExit): ctm_nb_sample([EMOJI, "--serve", "7891"])
    draw = gradio.Interface.call_args[0][0]
    for seed in (None, -1, 10 ** 22):
        with pytest.raises(gradio.Error, match=f"seed must be a whole number .*got seed={seed}"):
            draw("all", seed, 1, 0., 4, None)


def test_a_teacher_without_classes(untrained_run, tmp_path):
    run = str(untrained_run(tmp_path / "run", 1, []))
    m = load(run, which="teacher")
    said = draw_page(m, run, tmp_path / "a.png", steps=3, gamma=.5, n=2, which="teacher")
    assert "--steps 3" in said and "--gamma" not in said and "--which teacher`: 2 pictures, 5 NFE" in said
    assert "9 pictures, 5 NFE" in draw_page(m, run, tmp_path / "b.png", steps=3, n=2, other=1)


@pytest.mark.browser
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_a_browser_draws(tmp_path):
    faults, asked = [], []
    (shots := ROOT / "build" / "browser").mkdir(parents=True, exist_ok=True)
    with served(tmp_path, "-n", "36") as address, page(1200, 800) as p:
        p.on("pageerror", lambda e: faults.append(str(e)))
        p.on("request", lambda r: asked.append(r.url))
        p.goto(address)
        p.get_by_text("36 pictures, 1 NFE").wait_for(timeout=300_000)
        first = p.locator("img").first.get_attribute("src")
        p.get_by_label("class").click()
        p.get_by_role("option", name="smileys_and_emotion").click()
        p.get_by_label("seed", exact=True).fill("3")
        p.get_by_label("to seed").fill("4")
        p.get_by_role("button", name="Draw").click()
        p.get_by_text("from seed 3 to seed 4: 36 pictures").wait_for(timeout=120_000)
        p.wait_for_function("first => document.querySelector('img').getAttribute('src') != first", arg=first)
        p.wait_for_function("document.querySelector('img').naturalWidth > 300")
        p.screenshot(path=shots / "serve.png")
    assert not faults and all(u.startswith((address, "data:", "blob:")) for u in asked), (faults, asked)
