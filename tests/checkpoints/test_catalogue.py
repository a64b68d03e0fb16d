"""Public files by name: what the notebook `4_checkpoints/04_catalogue` shows on a few cases, here on many."""
import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from ctm_nb.checkpoints import catalogue
from ctm_nb.checkpoints.catalogue import (
    CATALOGUE, DownloadError, cache_folder, catalogue_table, fetch, nearest_name)
from ctm_nb.commands.flags import one_line_errors

BODY = random.Random(0).randbytes(200_001)
HASH = hashlib.sha256(BODY).hexdigest()
NAME = "ct-imagenet64"
FILE = f"{NAME}.pt"
OTHER = "edm-cifar10-32x32-cond-ve"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "CTM_NB_OFFLINE",
             "HF_HUB_OFFLINE", "XDG_CACHE_HOME")
PLAN = dict(
    body=BODY,
    etag='"v1"',
    modified=None,
    type="application/octet-stream",
    ranges=True,
    conditions=True,
    shift=0,
    status=None,
    cuts=(),
    stall=0,
    redirect=None,
    pause=None,
    length=True,
)


class Host(BaseHTTPRequestHandler):
    "Serves `plan.body` with the faults of `plan`; `log` holds (path, Range, If-Range, status, bytes sent)."

    def do_GET(self):
        plan, log = self.server.plan, self.server.log
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if plan.redirect and not self.path.startswith("/new"):
            return self.answer(302, {"Location": plan.redirect, "Content-Length": 0})
        start = int(re.findall(r"\d+", wanted)[0]) if wanted and plan.ranges else 0
        if plan.conditions and condition not in (None, plan.etag, plan.modified): start = 0
        body, status = plan.body, plan.status or (206 if start else 200)
        if start >= len(body) > 0: body, status, start = b"", 416, 0
        end = plan.cuts.pop(0) if plan.cuts else len(body)
        first = start + (plan.shift if start else 0)
        log.append((self.path, wanted, condition, status, end - start))
        try:
            self.answer(status, {
                "ETag": plan.etag, "Last-Modified": plan.modified, "Content-Type": plan.type,
                "Content-Length": len(body) - start if plan.length else None,
                "Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}" if status == 206 else None})
            half = end // 2 if plan.pause and not start else end
            self.wfile.write(body[start:half])
            self.wfile.flush()
            if half < end: plan.pause.wait(10)
            self.wfile.write(body[half:end])
            time.sleep(plan.stall)
        except OSError: pass
        self.close_connection = True

    def answer(self, status, headers):
        self.send_response(status)
        for key, value in headers.items():
            if value is not None: self.send_header(key, str(value))
        self.end_headers()

    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def host(server, tmp_path, monkeypatch):
    "`host.serve(**faults)`, `host.log()`, `host.get()`; an empty cache; an environment without proxies and switches."
    for name in VARIABLES: monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, .6)))  # pooch waits a second
    monkeypatch.setattr(catalogue, "TIMEOUT", (.5, .5))
    at = f"http://127.0.0.1:{server.server_port}"

    def move(at):
        for name in (NAME, OTHER):
            monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], url=f"{at}/{CATALOGUE[name].file}"))

    def serve(**plan):
        assert plan.keys() <= PLAN.keys()
        plan = {**PLAN, **plan}
        server.plan, server.log = SimpleNamespace(**{**plan, "cuts": list(plan["cuts"])}), []

    def get(name=NAME): return fetch(name)
    move(at)
    serve()
    yield SimpleNamespace(serve=serve, at=at, move=move, get=get, log=lambda: list(server.log), cache=tmp_path/"cache",
                          path=tmp_path/"cache"/FILE, part=tmp_path/"cache"/f"{FILE}.part")


def names(folder):
    "What lies in a folder, but for the lock."
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) if folder.exists() else []


def check(host, body=BODY):
    "The file is whole, its hash is written down, and nothing else is in the folder."
    assert host.path.read_bytes() == body
    assert names(host.cache) == [FILE, f"{FILE}.sha256"]
    assert (host.cache/f"{FILE}.sha256").read_text() == f"{hashlib.sha256(body).hexdigest()}  {FILE}\n"


def fails(host, words, kept=False, within=4.):
    "The download fails in one line with `words`, in time, and leaves nothing, or a part and its version."
    begin = time.monotonic()
    with pytest.raises(DownloadError) as e: host.get()
    assert time.monotonic() - begin < within
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not host.path.exists() and ("are kept" in str(e.value)) == kept
    assert (names(host.cache) == [f"{FILE}.part", f"{FILE}.part.version"]) == kept


# ---- a download that succeeds

@pytest.mark.parametrize("plan", [{}, dict(body=b""), dict(length=False, etag=None), dict(redirect="/new/place.pt")],
                         ids=["plain", "empty", "without length", "redirected"])
def test_complete(host, plan, monkeypatch):
    host.serve(**plan)
    assert host.get() == host.path
    check(host, plan.get("body", BODY))
    asked = len(host.log())
    monkeypatch.setenv("CTM_NB_OFFLINE", "1")
    assert host.get() == host.path and len(host.log()) == asked


def test_https_is_not_left(host, monkeypatch):
    "A server whose https address sends us on to one that is not."
    import requests
    answer = SimpleNamespace(status_code=200, url="http://b.org/x?secret", headers={})
    monkeypatch.setattr(requests, "get", lambda *a, **k: answer)
    with pytest.raises(
        DownloadError, match="https://a.org/x: the server sends us on to http://b.org/x, which is not https"
    ):
        host.get("https://a.org/x?key")


def test_progress_goes_to_a_terminal(host, capfd, monkeypatch):
    host.get()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    host.get(OTHER)
    out, err = capfd.readouterr()
    assert out == "" and OTHER in err and "100%" in err


def test_a_proxy_is_used(host, monkeypatch):
    "The proxy is asked for a host that does not exist, so nobody else can have answered."
    monkeypatch.setenv("http_proxy", host.at)
    for name in ("no_proxy", "NO_PROXY"): monkeypatch.delenv(name, raising=False)
    assert host.get("http://files.invalid/x.pkl").read_bytes() == BODY
    assert host.log()[0][0] == "http://files.invalid/x.pkl"


# ---- going on

@pytest.mark.parametrize(
    "validator", [{}, dict(etag=None, modified="Mon, 01 Jan 2024 00:00:00 GMT")], ids=["etag", "date"]
)
def test_a_cut_is_mended_and_the_next_call_goes_on(host, validator):
    host.serve(cuts=[50_000, 120_000], **validator)
    fails(host, "the connection was cut", kept=True)
    have = host.part.stat().st_size
    assert len(host.log()) == 2 and 100_000 < have <= 120_000
    host.serve(**validator)
    host.get()
    check(host)
    (_, wanted, _, status, sent), = host.log()
    assert (wanted, status, sent) == (f"bytes={have}-", 206, len(BODY) - have)


@pytest.mark.parametrize(
    "faults",
    [dict(ranges=False), dict(conditions=False, shift=7), dict(etag=None), dict(etag='W/"v1"')],
    ids=["no ranges", "wrong range", "no version", "weak version"],
)
def test_a_server_that_cannot_go_on(host, faults):
    host.serve(cuts=[100_000], **faults)
    host.get()
    check(host)
    assert host.log()[-1][3:] == (200, len(BODY))


@pytest.mark.parametrize("new", [{}, dict(conditions=False), dict(conditions=False, body=BODY[:40_000])],
                         ids=["if-range", "range regardless", "shorter (416)"])
def test_the_file_changed_between_two_calls(host, new):
    host.serve(cuts=[100_000, 120_000])
    fails(host, "the connection was cut", kept=True)
    new = {"body": BODY[::-1], "etag": '"v2"', **new}
    host.serve(**new)
    host.get()
    check(host, new["body"])


# ---- what is not the file

@pytest.mark.parametrize(
    "body", [b"<html><head><title>\n Sign in\n</title>" + b" " * 9000, b"\xef\xbb\xbf \r\n<!DOCTYPE html>"]
)
def test_a_login_page_instead_of_the_file(host, body):
    host.serve(body=body, type="text/html")
    fails(host, "is a web page ('Sign in')" if b"title" in body else "is a web page where")


@pytest.mark.parametrize(
    "status, words",
    [
        (401, "answered 401 Unauthorized"),
        (403, "answered 403 Forbidden"),
        (404, "answered 404 Not Found"),
        (503, "503"),
        (204, "204"),
    ],
)
def test_status(host, status, words):
    host.serve(status=status, body=b"")
    fails(host, words)
    assert len(host.log()) == 1


def test_a_server_that_stalls(host):
    host.serve(cuts=[100_000], stall=3)
    begin = time.monotonic()
    host.get()
    check(host)
    assert time.monotonic() - begin < 4


def test_nobody_there(host):
    host.move("http://127.0.0.1:9")
    fails(host, "http://127.0.0.1:9/ct-imagenet64.pt: Connection refused")
    host.move("http://files.invalid")
    fails(host, "files.invalid/ct-imagenet64.pt: ", within=40)


@pytest.mark.parametrize("url", ["ftp://a.org/x.pt", "http://", "http:///x", "file:///etc/passwd"])
def test_not_an_address(host, url):
    with pytest.raises(ValueError, match="url must be http"): host.get(url)


# ---- kills, neighbours, disks

CHILD = """
import sys
from dataclasses import replace
from ctm_nb.checkpoints.catalogue import CATALOGUE, fetch
name, at = sys.argv[1:]
CATALOGUE[name] = replace(CATALOGUE[name], url=f"{at}/{CATALOGUE[name].file}")
fetch(name)
"""


def child(host, code=CHILD):
    return subprocess.Popen([sys.executable, "-c", code, NAME, host.at], stderr=subprocess.PIPE, text=True)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.01)


def test_kill_in_the_middle(host):
    pause = threading.Event()
    host.serve(pause=pause)
    process = child(host)
    until(lambda: host.part.exists() and host.part.stat().st_size > 50_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    pause.set()
    have = host.part.stat().st_size
    assert not host.path.exists()
    host.serve()
    host.get()                                                   # the dead process's lock holds nobody up
    assert host.path.read_bytes() == BODY
    assert [(r[1], r[-1]) for r in host.log()] == [(f"bytes={have}-", len(BODY) - have)]


def test_two_processes_at_once(host):
    pause = threading.Event()
    host.serve(pause=pause)
    processes = [child(host), child(host)]
    until(host.log)
    time.sleep(.5)
    pause.set()
    for p in processes: assert p.wait(30) == 0, p.communicate()
    check(host)
    assert len(host.log()) == 1


def test_many_threads_at_once(host):
    errors = []
    def one():
        try: host.get()
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=one) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and len(host.log()) == 1
    check(host)


def test_disk_full(host, monkeypatch):
    class Full:
        "A file on a disk with room for 50,000 bytes."
        def __init__(self, f): self.f, self.room = f, 50_000
        def __enter__(self): return self
        def __exit__(self, *a): self.f.close()
        def __getattr__(self, name): return getattr(self.f, name)
        def write(self, data):
            self.room -= len(data)
            if self.room < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.f.write(data)
    opened = lambda p, mode="r": Full(open(p, mode)) if "a" in mode else open(p, mode)
    monkeypatch.setattr(catalogue, "open", opened, raising=False)
    fails(
        host, f"cannot write to {host.cache} (No space left on device); CTM_NB_CACHE can name another folder", kept=True
    )
    monkeypatch.setattr(catalogue, "open", open)
    host.get()
    check(host)
    assert host.log()[-1][1] == "bytes=49152-"


def test_folder_that_cannot_be_written_to(host, monkeypatch, tmp_path):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path/"file"/"sub"))
    with pytest.raises(DownloadError, match="cannot write to .*Not a directory.*CTM_NB_CACHE can name another"):
        host.get()


# ---- files that are there already

def test_a_file_that_changed(host):
    host.get()
    os.utime(host.path, (1, 1))
    host.get()                                                   # the same content at another time
    host.path.write_bytes(BODY[:-1] + b"!")
    with pytest.raises(DownloadError, match=f"has changed since its first use.*delete {FILE}.sha256 to accept it"):
        host.get()
    (host.cache/f"{FILE}.sha256").unlink()
    host.get()
    check(host, BODY[:-1] + b"!")
    assert len(host.log()) == 1


def test_a_shared_cache_that_is_read_only(host, monkeypatch):
    host.get()
    (host.cache/f"{FILE}.sha256").unlink()
    def refused(*a, **k): raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(Path, "write_text", refused)
    assert host.get() == host.path


# ---- names

def test_every_file_of_the_reference_is_listed():
    edm, openai = "https://nvlabs-fi-cdn.nvidia.com/edm/", "https://openaipublic.blob.core.windows.net/"
    networks = [f"edm-cifar10-32x32-{c}-{p}" for c in ("uncond", "cond") for p in ("vp", "ve")]
    networks += [f"edm-{d}-64x64-uncond-{p}" for d in ("ffhq", "afhqv2") for p in ("vp", "ve")]
    for name in [*networks, "edm-imagenet-64x64-cond-adm"]:
        assert CATALOGUE[name].url == f"{edm}pretrained/{name}.pkl" and CATALOGUE[name].licence == "CC BY-NC-SA 4.0"
        base = name.replace("edm", "baseline", 1)
        assert CATALOGUE[base].url == f"{edm}pretrained/baseline/{base}.pkl"
    for name in ("cifar10-32x32", "ffhq-64x64", "afhqv2-64x64", "imagenet-64x64", "imagenet-64x64-baseline"):
        assert CATALOGUE[f"edm-fid-{name}"].url == f"{edm}fid-refs/{name}.npz"
    for name, address in {
        "edm-imagenet64-openai": "consistency/edm_imagenet64_ema.pt",
        "ct-imagenet64": "consistency/ct_imagenet64.pt",
        "cd-imagenet64-lpips": "consistency/cd_imagenet64_lpips.pt",
        "adm-imagenet64-reference": "diffusion/jul-2021/ref_batches/imagenet/64/VIRTUAL_imagenet64_labeled.npz",
    }.items():
        assert CATALOGUE[name].url == openai + address
    ada = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    assert CATALOGUE["inception-2015-12-05"].url == f"{ada}inception-2015-12-05.pt"
    ctm = CATALOGUE["ctm-imagenet64"]
    assert ctm.url is None and "17XHwI5-IDpATRnBsxjOi6YCg1oD3MGC6" in ctm.how
    assert "1KPF3tWLRad3n18XJ1TD7J04XtoMIQ8QV" in ctm.how


def test_entries_are_complete():
    formats = {"EDM pickle", "EDM2 snapshot", "OpenAI state dict", "CTM, OpenAI state dict", "mu, sigma npz",
               "TorchScript", "npz", "npm package", "consistency model (not a CTM)"}
    for name, e in CATALOGUE.items():
        assert (
            e.name == name
            and re.fullmatch("[a-z0-9.-]+", name)
            and e.what
            and e.licence
            and e.file.startswith(name + ".")
        )
        assert e.kind in {"teacher", "ctm", "cm", "reference", "features", "runtime"} and e.loads_as in formats
        assert bool(e.url) != bool(e.how) and (e.url is None or urlsplit(e.url).scheme == "https")
    n = len(CATALOGUE)
    assert (
        len({e.file for e in CATALOGUE.values()})
        == len({e.url for e in CATALOGUE.values()})
        == len(set(CATALOGUE.values()))
        == n
    )


def test_names():
    assert nearest_name("EDM-CIFAR10-32x32-cond-vq") == "edm-cifar10-32x32-cond-vp" and nearest_name("/tmp/x") is None
    with pytest.raises(ValueError, match="no public file is called 'ctm-imagenet46'; did you mean 'ctm-imagenet64'?"):
        fetch("ctm-imagenet46")


def test_table(host):
    host.cache.mkdir()
    (host.cache/"ctm-imagenet64.pt").write_bytes(b"PK" + bytes(1_999_998))
    table = catalogue_table()
    for name, e in CATALOGUE.items():
        for cell in (name, e.kind, e.loads_as, e.licence, e.what, e.url or e.how): assert cell in table
    assert "2.0 MB" in table and str(host.cache) in table and max(map(len, table.splitlines())) < 250


def test_cache_folder(host, monkeypatch, tmp_path):
    assert cache_folder() == host.cache
    monkeypatch.delenv("CTM_NB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    if sys.platform == "linux":
        assert cache_folder() == tmp_path/".cache"/"ctm_nb"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"xdg"))
        assert cache_folder() == tmp_path/"xdg"/"ctm_nb"
    monkeypatch.setenv("CTM_NB_CACHE", "~/mine")
    assert host.get() == tmp_path/"mine"/FILE


def test_fetch_by_name_and_by_address(host):
    assert host.get(OTHER) == host.cache/"edm-cifar10-32x32-cond-ve.pkl"
    assert host.log()[0][0] == "/edm-cifar10-32x32-cond-ve.pkl"
    one, two = (host.get(f"{host.at}/{a}/my%20model.pt") for a in "ab")
    assert one != two and one.name.startswith("my_model-") and one.suffix == ".pt" and one.read_bytes() == BODY
    assert host.get(f"{host.at}/a/my%20model.pt") == one and len(host.log()) == 3
    assert all(len(host.get(f"{host.at}/{'n'*n}.pt").name) < 120 for n in (0, 100, 1000))


@pytest.mark.parametrize(
    "environment, offline",
    [
        ({}, False),
        (dict(CTM_NB_OFFLINE="1"), True),
        (dict(CTM_NB_OFFLINE="TRUE"), True),
        (dict(CTM_NB_OFFLINE="0"), False),
        (dict(HF_HUB_OFFLINE="1"), True),
        (dict(HF_HUB_OFFLINE="1", CTM_NB_OFFLINE="0"), False),
        (dict(CTM_NB_OFFLINE=""), False),
    ],
)
def test_offline(host, monkeypatch, environment, offline):
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    if offline:
        with pytest.raises(
            DownloadError, match=f"switched off.*fetch {host.at}/{FILE} elsewhere and put it at {host.path}"
        ):
            host.get()
        assert host.log() == [] and not host.cache.exists()
        monkeypatch.setenv("CTM_NB_OFFLINE", "0")
    assert host.get() == host.path
    monkeypatch.setenv("CTM_NB_OFFLINE", "1")
    assert host.get() == host.path and len(host.log()) == 1


def test_by_browser(host):
    path = host.cache/"ctm-imagenet64.pt"
    with pytest.raises(
        DownloadError, match="needs a browser: open https://drive.google.com/file/d/.*/view in a browser"
    ):
        host.get("ctm-imagenet64")
    host.cache.mkdir()
    path.write_bytes(b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title>")
    with pytest.raises(DownloadError, match=r"ctm-imagenet64.pt is a web page \('Google Drive - Virus scan warning'\)"):
        host.get("ctm-imagenet64")
    path.write_bytes(BODY)
    assert host.get("ctm-imagenet64") == path and names(host.cache) == [path.name, f"{path.name}.sha256"]


def test_the_commands_print_one_line(host, capfd):
    for name, code in (("ctm-imagenet64", 3), ("nothing-like-it", 2)):
        with pytest.raises(SystemExit) as e, one_line_errors("ctm_nb_convert"): fetch(name)
        assert e.value.code == code and capfd.readouterr().err.count("\n") == 1


def test_the_catalogue_is_light():
    code = ("import json, sys; from ctm_nb.checkpoints.catalogue import catalogue_table; catalogue_table(); "
            "print(json.dumps([m for m in ('torch', 'requests', 'numpy') if m in sys.modules]))")
    assert (
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        == []
    )


def test_published_files_are_known_by_their_hash(tmp_path, monkeypatch):
    "Where a hash is known, nothing else is taken for the file, not even on its first use."
    from ctm_nb.checkpoints.catalogue import SHA256
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path))
    monkeypatch.setenv("CTM_NB_OFFLINE", "1")
    for name, pinned in SHA256.items():
        assert len(bytes.fromhex(pinned)) == 32 and CATALOGUE[name].sha256 == pinned
        (tmp_path / CATALOGUE[name].file).write_bytes(b"something else")
        with pytest.raises(DownloadError, match=f"is not the published file.*expected {pinned[:12]}"): fetch(name)
    (tmp_path / "ct-imagenet64.pt").write_bytes(b"of unknown hash")
    assert fetch("ct-imagenet64").read_bytes() == b"of unknown hash"
