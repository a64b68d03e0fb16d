"""Models on the Hugging Face Hub, against a stand-in of its HTTP interface on this machine: share, load, refuse."""
import base64
import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from warm import python

from ctm_nb.checkpoints.models import load, save_model

pytest.importorskip("huggingface_hub")
EMOJI = Path(__file__).resolve().parents[2] / "nbs" / "results" / "emoji" / "student.safetensors"
COMMIT = "0" * 39 + "1"


class Hub(BaseHTTPRequestHandler):
    "As much of the Hub as sharing and loading a model ask for."
    files: dict = {}
    private: list = []  # does a wish to make a repository say so? the first one counts

    def log_message(self, *_): pass

    def answer(self, what, status=200, **headers):
        body = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        for k, v in {"Content-Length": len(body), **headers}.items(): self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def do_POST(self):
        here = f"http://{self.headers['Host']}"
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "who are you?"}, 401, X_Error_Message="who are you?")
        if self.path == "/api/repos/create":
            wish = json.loads(sent)
            self.private.append(wish.get("private") is True or wish.get("visibility") == "private")
            return self.answer({"url": f"{here}/me/digits", "id": "me/digits"})
        if self.path.startswith("/api/models/me/digits/preupload/"):
            asked = json.loads(sent)["files"]
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                          for f in asked]})
        if self.path.startswith("/api/models/me/digits/commit/"):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file": self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{here}/me/digits/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        if self.path == "/api/validate-yaml": return self.answer({"errors": [], "warnings": []})
        self.answer({"error": self.path}, 404)

    def do_GET(self):
        name = self.path.partition("/resolve/main/")[2]
        if self.path.startswith("/me/digits/resolve/") and name in self.files:
            etag = hashlib.sha256(self.files[name]).hexdigest()
            return self.answer(self.files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        if self.path.startswith("/api/models/me/digits"):
            about = {"id": "me/digits", "sha": COMMIT, "siblings": [], "private": self.private[:1] == [True]}
            return self.answer(about)
        self.answer({"error": "not here"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    "Runs Python against the stand-in: run(code, **environment) -> exit code, output, errors."
    Hub.files.clear()
    Hub.private.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    fixed = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
             "HF_TOKEN": "hf_right", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1",
             "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    fixed.pop("HF_HUB_OFFLINE", None)
    def run(code, **env):
        r = python(code, env={**fixed, **env})
        return r.returncode, r.stdout, r.stderr
    yield run
    server.shutdown()
    server.server_close()


SHARE = f"from ctm_nb.commands.convert import ctm_nb_convert\nctm_nb_convert([{str(EMOJI)!r}, 'hf:me/digits'])"
LOAD = ("import ctm_nb, torch\nm = ctm_nb.load('hf:me/digits')\n"
        f"own = ctm_nb.load({str(EMOJI)!r}).state_dict()\n"
        "assert all(torch.equal(v, own[k]) for k, v in m.state_dict().items())\nprint(m.about)")


def test_shared_and_loaded(hub):
    code, out, err = hub(SHARE)
    assert code == 0 and "shared: " in out, err
    assert set(Hub.files) == {"model.safetensors", "README.md", "config.json"}
    card = Hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: ctm_nb\n")
    assert 'load("hf:me/digits")' in card and "Classes: activities" in card
    code, out, err = hub(LOAD)
    assert code == 0 and "2.14 M parameters" in out, err
    code, out, err = hub(LOAD, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")  # from the cache
    assert code == 0, err


def test_private_is_private_or_nothing_is_sent(hub):
    alone = SHARE.replace("'hf:me/digits'", "'hf:me/digits', '--private'")
    code, out, err = hub(alone)
    assert code == 0 and Hub.private == [True] and "model.safetensors" in Hub.files, err
    Hub.files.clear()
    Hub.private[:] = [False]
    code, out, err = hub(alone)
    assert code == 2 and "it is there, and public" in err and err.count("\n") == 1 and not Hub.files


def test_refused_in_one_line(hub):
    code, out, err = hub(SHARE, HF_TOKEN="hf_wrong")
    assert code == 2 and "hf:me/digits: not shared (" in err and "Traceback" not in err and not Hub.files
    load = "from ctm_nb.commands.convert import ctm_nb_convert\nctm_nb_convert(['hf:me/nothing'])"
    code, out, err = hub(load)
    assert code == 3 and "hf:me/nothing: no model.safetensors could be had" in err and "Traceback" not in err


def test_without_a_network_it_is_one_line(hub):
    code, out, err = hub(SHARE, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and "hf:me/digits: not shared (" in err and "Traceback" not in err and err.count("\n") == 1


def test_folders_of_this_machine_stay_here(hub, tmp_path):
    config = {"data": {"source": "/srv/anna/cats.zip", "crops": ["/srv/anna/a.json", 3]}, "run": {"name": "cats"}}
    own = save_model(load(str(EMOJI)), tmp_path / "own.safetensors", config)
    code, out, err = hub(SHARE.replace(str(EMOJI), str(own)))
    assert code == 0, err
    assert json.loads(Hub.files["config.json"])["data"] == {"source": "cats.zip", "crops": ["a.json", 3]}
    assert not any(b"anna" in content for content in Hub.files.values())
