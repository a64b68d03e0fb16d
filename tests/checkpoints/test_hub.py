"""What the notebooks `4_checkpoints/04_catalogue` and `4_checkpoints/04_catalogue` show on a few cases, here on many, against a server that misbehaves as told."""
import errno
import gzip
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from ctm_nb.checkpoints import catalogue as dl
from ctm_nb.commands.train import one_line_errors
from ctm_nb.checkpoints.catalogue import PIECE, DownloadError, PlaceError, download
from ctm_nb.checkpoints.catalogue import CATALOGUE, cache_folder, catalogue_table, fetch, is_public_name, nearest_name, offline_mode

BODY = random.Random(0).randbytes(200_001)
FAST = (.5, .5)


class Host(BaseHTTPRequestHandler):
    "Serves `plan.body` with the faults of `plan`; `log` holds (path, Range, If-Range, status, bytes sent) of each request."

    def do_GET(self):
        plan, log, wanted, condition = self.server.plan, self.server.log, self.headers.get("Range"), self.headers.get("If-Range")
        if plan.redirect and not self.path.startswith("/new"):
            log.append((self.path, wanted, condition, 302, 0))
            self.send_response(302)
            self.send_header("Location", plan.redirect)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(re.findall(r"\d+", wanted)[0]) if wanted and plan.ranges else 0
        if plan.conditions and condition not in (None, plan.etag, plan.modified): start = 0
        body, status = plan.body, plan.status or (206 if start else 200)
        if start >= len(body) > 0: body, status, start = b"", 416, 0
        shift = plan.shift if start else 0
        end = plan.cuts.pop(0) if plan.cuts else len(self.server.zipped if plan.gzip else body)
        if plan.late: time.sleep(plan.late)
        headers = {"ETag": plan.etag, "Last-Modified": plan.modified, "Content-Type": plan.type, "Content-Length": (plan.claims or len(body)) - start,
                   "Content-Range": f"bytes {start + shift}-{len(body) - 1}/{len(body)}" if status == 206 else None}
        if plan.gzip: body, headers = self.server.zipped, {**headers, "Content-Encoding": "gzip", "Content-Length": len(self.server.zipped)}
        if plan.chunked: headers.update({"Content-Length": None, "Transfer-Encoding": "chunked"})
        try:
            self.send_response(status)
            for key, value in headers.items():
                if value is not None: self.send_header(key, str(value))
            self.end_headers()
            log.append((self.path, wanted, condition, status, end - start))
            pieces = [body[start:end]] if not plan.pause or start else [body[:end//2], body[end//2:end]]
            for i, piece in enumerate(pieces):
                if i: plan.pause.wait(10)
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if plan.chunked else piece)
                self.wfile.flush()
            if plan.chunked and end == len(body): self.wfile.write(b"0\r\n\r\n")
            if plan.stall: time.sleep(plan.stall)
        except OSError: pass
        self.close_connection = True

    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads, server.zipped = True, gzip.compress(BODY)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def host(server, tmp_path, monkeypatch):
    "`host.serve(**faults)`, `host.log`, `host.url`; an empty cache in `host.cache`; an environment without proxies and switches."
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "CTM_NB_OFFLINE", "HF_HUB_OFFLINE", "CTM_NB_MIRROR",
                 "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CTM_NB_CACHE", str(tmp_path/"cache"))

    def serve(**plan):
        default = dict(body=BODY, etag='"v1"', modified=None, type="application/octet-stream", ranges=True, conditions=True, status=None, claims=None, cuts=[],
                       stall=0, late=0, redirect=None, pause=None, shift=0, chunked=False, gzip=False)
        assert plan.keys() <= default.keys()
        server.plan, server.log = SimpleNamespace(**{**default, **plan}), []
    serve()
    yield SimpleNamespace(serve=serve, at=f"http://127.0.0.1:{server.server_port}", url=f"http://127.0.0.1:{server.server_port}/x.pkl",
                          path=tmp_path/"here"/"x.pkl", cache=tmp_path/"cache", get=lambda: list(server.log), sent=lambda: sum(r[-1] for r in server.log))


def names(folder): return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def check(host, body=BODY, path=None):
    "The file is whole, its receipt is right, and nothing else is in the folder."
    path = path or host.path
    assert path.read_bytes() == body
    assert names(path.parent) == [path.name, path.name + ".json"]
    note = json.loads((path.parent/(path.name + ".json")).read_text())
    assert (note["size"], note["sha256"], note["mtime_ns"]) == (len(body), hashlib.sha256(body).hexdigest(), path.stat().st_mtime_ns)


def fails(host, words, within=3., kept=False, url=None, exc=DownloadError, **arguments):
    "The download fails in one line that contains `words`, in time, and leaves no file: nothing at all, or a part with its note."
    begin = time.monotonic()
    with pytest.raises(exc) as e: download(url or host.url, host.path, **{**dict(timeout=FAST, progress=False), **arguments})
    assert time.monotonic() - begin < within
    assert words in str(e.value) and "\n" not in str(e.value)
    assert names(host.path.parent) == (["x.pkl.part", "x.pkl.part.json"] if kept else [])
    assert ("are kept" in str(e.value)) == kept
    return str(e.value)


def get(host, **arguments): return download(host.url, host.path, **{**dict(timeout=FAST, progress=False), **arguments})


# ---- a download that succeeds

@pytest.mark.parametrize("n", [0, 1, PIECE - 1, PIECE, PIECE + 1, len(BODY)])
def test_complete(host, n):
    host.serve(body=BODY[:n])
    assert get(host) == host.path
    check(host, BODY[:n])
    assert get(host) == host.path and len(host.get()) == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_without_a_length(host, chunked):
    host.serve(chunked=chunked, etag=None)
    get(host)
    check(host)


def test_redirect(host):
    host.serve(redirect="/new/place.pkl")
    get(host)
    check(host)
    host.serve(redirect="/loop", body=b"")
    host.path = host.path.parent.parent/"other"/"x.pkl"
    fails(host, "redirects", url=host.url)


@pytest.mark.parametrize("cuts", [[], [100_000]])
def test_a_server_that_compresses_all_the_same(host, cuts):
    "What travels is a compressed copy, and parts of it mean nothing for the file."
    host.serve(gzip=True, cuts=list(cuts))
    get(host)
    check(host)
    assert [r[1] for r in host.get()] == [None]*(1 + len(cuts))


def test_the_request_asks_for_the_plain_bytes(monkeypatch):
    asked = {}
    monkeypatch.setattr("requests.get", lambda url, **k: asked.update(k) or SimpleNamespace(url=url))
    dl._request("https://a.org/x", 7, dict(etag=None, modified="yesterday"), (1, 2))
    headers = asked["headers"]
    assert asked["timeout"] == (1, 2) and (headers["Accept-Encoding"], headers["Range"], headers["If-Range"]) == ("identity", "bytes=7-", "yesterday")


def test_https_is_not_left(monkeypatch):
    closed = []
    monkeypatch.setattr("requests.get", lambda url, **k: SimpleNamespace(url="http://b.org/x?secret", close=lambda: closed.append(1)))
    with pytest.raises(DownloadError, match="https://a.org/x: the server sends us on to http://b.org/x, which is not https"): dl._request("https://a.org/x", 0, {}, FAST)
    assert closed


def test_progress_goes_to_stderr(host, capfd):
    get(host, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "x.pkl" in err and "100%" in err
    download(host.url, host.path.parent/"y.pkl", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_proxy_is_used(host, monkeypatch):
    "The proxy is asked for a host that does not exist, so nobody else can have answered."
    monkeypatch.setenv("http_proxy", host.at)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    download("http://files.invalid/x.pkl", host.path, timeout=FAST, progress=False)
    check(host)
    assert host.get()[0][0] == "http://files.invalid/x.pkl"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="the proxy does not help.*Connection refused.*HTTPS_PROXY"): download("http://files.invalid/y", host.path.parent/"y")


# ---- going on

@pytest.mark.parametrize("cut", [1, PIECE - 1, PIECE, PIECE + 1, 100_000, len(BODY) - 1])
def test_a_cut_is_mended(host, cut):
    host.serve(cuts=[cut])
    get(host)
    check(host)
    assert len(host.get()) == 2 and len(BODY) <= host.sent() < len(BODY) + PIECE
    if cut >= PIECE: assert host.get()[1][1:4] == (f"bytes={cut - cut % PIECE}-", '"v1"', 206)


@pytest.mark.parametrize("validator", [dict(etag='"v1"'), dict(etag=None, modified="Mon, 01 Jan 2024 00:00:00 GMT")])
def test_the_next_call_goes_on(host, validator):
    host.serve(cuts=[50_000, 120_000], **validator)
    assert "cut" in fails(host, "the connection was cut", kept=True)
    assert len(host.get()) == 2
    host.serve(**validator)
    get(host)
    check(host)
    assert len(host.get()) == 1 and host.sent() < len(BODY) - 120_000 + PIECE


@pytest.mark.parametrize("faults", [dict(ranges=False), dict(conditions=False, shift=7)], ids=["no ranges", "wrong range"])
def test_a_server_that_cannot_go_on(host, faults):
    host.serve(cuts=[100_000], **faults)
    get(host)
    check(host)
    assert host.get()[-1][3:] == (200, len(BODY))


@pytest.mark.parametrize("validator", [dict(etag=None), dict(etag='W/"v1"')])
def test_without_a_validator_nothing_is_continued(host, validator):
    host.serve(cuts=[100_000], **validator)
    get(host)
    check(host)
    assert [r[1] for r in host.get()] == [None, None]
    host.serve(cuts=[100_000, 100_000], **validator)
    host.path = host.path.with_name("x.pkl").parent.parent/"there"/"x.pkl"
    fails(host, "the connection was cut")


@pytest.mark.parametrize("new", [dict(etag='"v2"'), dict(etag='"v2"', conditions=False), dict(conditions=False, body=BODY[::-1] + b"more"),
                                 dict(etag='"v2"', conditions=False, body=BODY[:40_000])],
                         ids=["if-range", "range regardless", "same etag, other size", "shorter (416)"])
def test_the_file_changed_between_two_calls(host, new):
    host.serve(cuts=[100_000, 120_000])
    fails(host, "the connection was cut", kept=True)
    new = {"body": BODY[::-1], **new}
    host.serve(**new)
    get(host)
    check(host, new["body"])


def test_a_part_from_another_address_is_not_continued(host):
    host.serve(cuts=[100_000, 120_000])
    fails(host, "the connection was cut", kept=True)
    host.serve(body=BODY[::-1])
    download(host.at + "/other.pkl", host.path, progress=False)
    check(host, BODY[::-1])


def test_a_complete_part_needs_no_server(host, monkeypatch):
    "Killed after the last byte and before the rename, or between receipt and rename."
    monkeypatch.setattr(dl, "_publish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): get(host)
    monkeypatch.undo()
    with monkeypatch.context() as m:
        replace = os.replace
        m.setattr(os, "replace", lambda a, b: replace(a, b) if str(b).endswith(".json") else (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): get(host)
    assert names(host.path.parent) == ["x.pkl.json", "x.pkl.part", "x.pkl.part.json"]
    host.serve(status=404)
    get(host)
    check(host)
    assert host.get() == []


def test_the_note_is_written_after_the_old_part_is_gone(host, monkeypatch):
    host.serve(cuts=[100_000, 120_000])
    fails(host, "the connection was cut", kept=True)
    host.serve(etag='"v2"', body=BODY[::-1])
    monkeypatch.setattr(dl, "_write_note", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))       # killed right there
    with pytest.raises(KeyboardInterrupt): get(host)
    monkeypatch.undo()
    assert names(host.path.parent) == ["x.pkl.part.json"]
    get(host)
    check(host, BODY[::-1])


# ---- what is not the file

@pytest.mark.parametrize("plan", [dict(claims=210_000, ranges=False), dict(claims=210_000)])
def test_fewer_bytes_than_announced(host, plan):
    host.serve(**plan)
    fails(host, "the connection was cut" if not plan.get("ranges", True) else "", kept=True)
    assert len(host.get()) <= 3


def test_bytes_are_counted_even_if_nobody_complains(host, monkeypatch):
    receive = dl._receive
    def short(response, path, *rest):
        receive(response, path, *rest)
        os.truncate(path.with_name("x.pkl.part"), 1000)
    monkeypatch.setattr(dl, "_receive", short)
    fails(host, "the connection ended after 1,000 of 200,001 bytes", kept=True)
    def longer(response, path, *rest):
        receive(response, path, *rest)
        with open(path.with_name("x.pkl.part"), "ab") as f: f.write(b"!")
    monkeypatch.setattr(dl, "_receive", longer)
    fails(host, "200,002 bytes came where 200,001 were announced")


def test_hash(host):
    good = hashlib.sha256(BODY).hexdigest()
    fails(host, f"the file has SHA-256 {good}, expected {'0'*64}; it was thrown away", sha256="0"*64)
    fails(host, "sha256 must be 64 hexadecimal digits, got 'abc'", sha256="abc", exc=ValueError)
    get(host, sha256=good.upper())
    check(host)
    with pytest.raises(DownloadError, match="expected 0000"): get(host, sha256="0"*64)
    check(host)


PAGE = b"<html><head><title>\n Sign in\n</title>" + b" "*9000


@pytest.mark.parametrize("plan", [dict(type="text/html"), dict(type="Text/HTML; charset=utf-8", body=b"Please sign in"), dict(), dict(body=b"\xef\xbb\xbf \r\n" + PAGE),
                                  dict(type=None), dict(body=b"<?xml version='1.0'?><Error/>")])
def test_a_web_page(host, plan):
    host.serve(**{"body": PAGE, **plan})
    message = fails(host, "is a web page")
    assert ("('Sign in')" in message) == (plan.get("body", PAGE).endswith(PAGE))


@pytest.mark.parametrize("status, words", [(401, "login"), (403, "403 Forbidden (it does not give"), (404, "404 Not Found (nothing is there"), (410, "410 Gone"),
                                           (429, "try later"), (500, "server's side"), (503, "server's side"), (204, "expected 200")])
def test_status(host, status, words):
    host.serve(status=status, body=b"")
    fails(host, words)


def test_secrets_are_not_told(host):
    url = host.url.replace("http://", "http://me:secret@") + "?signature=secret"
    host.serve(cuts=[100_000, 150_000])
    assert "secret" not in fails(host, "cut", url=url, kept=True)
    assert "secret" not in host.path.with_name("x.pkl.part.json").read_text()
    host.serve()
    download(url, host.path, progress=False)
    assert "secret" not in host.path.with_name("x.pkl.json").read_text()
    assert host.get()[0][1] is not None                          # and it went on


# ---- no network, or not for long

def test_closed_port(host): fails(host, "cannot connect to 127.0.0.1 (Connection refused)", url="http://127.0.0.1:9/x.pkl")


def test_unroutable(host):
    "An address of the block for documentation: refused by the system or never answered, depending on where the test runs."
    message = fails(host, "192.0.2.1", url="http://192.0.2.1/x.pkl")
    assert "did not answer within 0.5 s" in message or "cannot connect" in message


@pytest.mark.parametrize("error, words", [(socket.gaierror(-2, "Name or service not known"), "cannot be resolved (Name or service not known)"),
                                          (UnicodeError("label too long"), "cannot be resolved (label too long)")])
def test_no_such_name(host, monkeypatch, error, words):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(error))
    fails(host, words, url="https://files.invalid/x.pkl")


def test_name_lookup_that_hangs(host, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(3))
    fails(host, "was not resolved within 0.5 s", url="https://files.invalid/x.pkl", within=1.5)


def test_many_addresses_that_never_answer(host, monkeypatch):
    monkeypatch.setattr("requests.get", lambda *a, **k: time.sleep(5))
    fails(host, "127.0.0.1 did not answer within 1 s", within=2)


@pytest.mark.parametrize("plan, kept", [(dict(late=2), False), (dict(stall=2, cuts=[100_000]), True)], ids=["before the answer", "in the middle"])
def test_stall(host, plan, kept):
    host.serve(**plan)
    fails(host, "nothing came from 127.0.0.1 for 0.3 s", timeout=(1, .3), within=1.5, kept=kept)
    assert len(host.get()) <= 1                                  # not tried again
    if kept: host.serve(); get(host); check(host)


def test_no_https_here(host): fails(host, "127.0.0.1", url=host.url.replace("http:", "https:"))


@pytest.mark.parametrize("url", ["ftp://a.org/x", "http://", "x.pkl", "file:///etc/passwd"])
def test_not_an_address(host, url): fails(host, "url must be http(s)://host/path, got", url=url, exc=ValueError)


@pytest.mark.parametrize("timeout", [0, -1, (1,), (1, 2, 3), "5", (5, None)])
def test_bad_timeout(host, timeout): fails(host, "timeout must be seconds > 0", timeout=timeout, exc=ValueError)


# ---- kills, neighbours, disks

CHILD = "import sys; from ctm_nb.checkpoints.catalogue import download; download(sys.argv[1], sys.argv[2], progress=False)"


def child(host, code=CHILD, **popen): return subprocess.Popen([sys.executable, "-c", code, host.url, str(host.path)], stderr=subprocess.PIPE, text=True, **popen)


def until(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.01)


def test_kill_in_the_middle(host):
    pause, part = threading.Event(), host.path.with_name("x.pkl.part")
    host.serve(pause=pause)
    process = child(host)
    until(lambda: part.exists() and part.stat().st_size > 50_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    pause.set()
    assert set(names(host.path.parent)) == {"x.pkl.lock", "x.pkl.part", "x.pkl.part.json"}
    have = part.stat().st_size
    host.serve()
    get(host)                                                    # the dead process's lock holds nobody up
    check(host)
    assert [(r[1], r[-1]) for r in host.get()] == [(f"bytes={have}-", len(BODY) - have)]


def test_two_processes_at_once(host):
    pause = threading.Event()
    host.serve(pause=pause)
    processes = [child(host), child(host)]
    until(host.get)
    time.sleep(.5)
    pause.set()
    for p in processes: assert p.wait(15) == 0, p.communicate()
    check(host)
    assert len(host.get()) == 1


def test_many_threads_at_once(host):
    errors = []
    def one():
        try: get(host)
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=one) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and len(host.get()) == 1
    check(host)


def test_a_lock_on_a_removed_file_is_none(host, monkeypatch):
    "The holder removes the lock file just before we lock it, and somebody else makes a new one."
    host.path.parent.mkdir()
    lock, flock = host.path.with_name("x.pkl.lock"), dl.fcntl.flock
    for again in (lock.touch, lambda: None):
        monkeypatch.setattr(dl.fcntl, "flock", lambda *a: (lock.unlink(), again(), flock(*a)))
        assert dl._take(lock) is None
    monkeypatch.undo()
    held = dl._take(lock)
    assert held and dl._take(lock) is None
    held.close()


def test_a_neighbour_that_hangs(host):
    host.path.parent.mkdir()
    code = "import fcntl, sys, time; f = open(sys.argv[2] + '.lock', 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, host.url, str(host.path)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        with pytest.raises(DownloadError, match="another process is downloading .*x.pkl and got nothing for 0.4 s"): get(host, timeout=.1)
    finally: process.kill(), process.wait(), process.stdout.close()
    get(host)
    check(host)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full(host, monkeypatch, code):
    class Full:
        "A file on a disk with room for 50,000 bytes more."
        def __init__(self, f): self.f, self.room = f, 50_000
        def __enter__(self): return self
        def __exit__(self, *a): self.f.close()
        def write(self, data):
            self.room -= len(data)
            if self.room < 0: raise OSError(code, os.strerror(code))
            return self.f.write(data)
        def __getattr__(self, name): return getattr(self.f, name)
    monkeypatch.setattr(dl, "open", lambda p, mode="r", **k: Full(open(p, mode, **k)) if str(p).endswith(".part") and "a" in mode else open(p, mode, **k), raising=False)
    fails(host, os.strerror(code), kept=True, exc=PlaceError)
    monkeypatch.undo()
    get(host)
    check(host)
    assert host.sent() > len(BODY) and host.get()[-1][1] == "bytes=49152-"


def test_file_size_limit_of_a_real_process(host):
    code = CHILD.replace("download(sys", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); download(sys")
    _, err = (process := child(host, code)).communicate(timeout=20)
    assert process.returncode == 1 and "no room for" in err and "File too large" in err
    assert not host.path.exists() and host.path.with_name("x.pkl.part").stat().st_size <= 60_000
    get(host)
    assert host.path.read_bytes() == BODY


def test_room_is_looked_for_first(host, monkeypatch):
    monkeypatch.setattr(dl.shutil, "disk_usage", lambda p: SimpleNamespace(free=200_000))
    fails(host, "200,001 bytes are needed, 200,000 bytes are free", exc=PlaceError)


def test_folder_that_cannot_be_written_to(host, monkeypatch, tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(PlaceError, match="cannot write to .*file"): download(host.url, tmp_path/"file"/"x.pkl")
    with pytest.raises(PlaceError, match="cannot write to .*Not a directory"): download(host.url, tmp_path/"file"/"sub"/"x.pkl")
    monkeypatch.setattr(os, "access", lambda p, mode: False)     # root may write everywhere
    with pytest.raises(PlaceError, match=r"cannot write to .*cache \(not writable\); CTM_NB_CACHE can name another folder"): fetch("inception-2015-12-05", mirror=host.at)
    assert host.get() == [] and names(host.cache) == []


# ---- files that are there already

def test_a_file_that_changed(host):
    get(host)
    before = host.path.stat()
    os.utime(host.path, (1, 1))
    get(host)                                                    # the same content at another time is noted
    check(host)
    os.truncate(host.path, 1000)
    with pytest.raises(DownloadError, match="has changed since .*1,000 bytes .* 200,001 .*delete x.pkl.json to accept it"): get(host)
    host.path.write_bytes(BODY[:-1] + b"!")
    with pytest.raises(DownloadError, match="has changed since"): get(host)
    os.utime(host.path, ns=(before.st_atime_ns, 1_000_000_000))
    note = host.path.with_name("x.pkl.json")
    assert json.loads(note.read_text())["mtime_ns"] == 1_000_000_000
    assert get(host)                                             # size and time as recorded: taken on trust
    with pytest.raises(DownloadError, match="has changed since"): dl.is_whole(host.path, verify=True)
    note.unlink()
    get(host)                                                    # accepted
    check(host, BODY[:-1] + b"!")
    assert len(host.get()) == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_a_receipt_that_cannot_be_read(host, text):
    get(host)
    host.path.with_name("x.pkl.json").write_text(text)
    get(host)
    check(host)


def test_a_shared_cache_that_is_read_only(host, monkeypatch):
    get(host)
    os.utime(host.path, (1, 1))
    monkeypatch.setattr(dl, "_write_note", lambda *a: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    assert get(host) == host.path
    host.path.with_name("x.pkl.json").unlink()
    assert get(host) == host.path


# ---- names

def test_every_file_of_the_reference_is_listed():
    vp_ve = [f"edm-cifar10-32x32-{c}-{p}" for c in ("uncond", "cond") for p in ("vp", "ve")]
    vp_ve += [f"edm-{d}-64x64-uncond-{p}" for d in ("ffhq", "afhqv2") for p in ("vp", "ve")]
    for name in [*vp_ve, "edm-imagenet-64x64-cond-adm"]:
        assert CATALOGUE[name].url == f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{name}.pkl" and CATALOGUE[name].licence == "CC BY-NC-SA 4.0"
        base = name.replace("edm", "baseline", 1)
        assert CATALOGUE[base].url == f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/baseline/{base}.pkl"
    for name in ("cifar10-32x32", "ffhq-64x64", "afhqv2-64x64", "imagenet-64x64", "imagenet-64x64-baseline"):
        assert CATALOGUE[f"edm-fid-{name}"].url == f"https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/{name}.npz"
    openai = "https://openaipublic.blob.core.windows.net/"
    for name, address in {"edm-imagenet64-openai": "consistency/edm_imagenet64_ema.pt", "cd-imagenet64-lpips": "consistency/cd_imagenet64_lpips.pt",
                          "ct-imagenet64": "consistency/ct_imagenet64.pt", "inception-2015-12-05": "consistency/inception/inception-2015-12-05.pt",
                          "adm-imagenet64-reference": "diffusion/jul-2021/ref_batches/imagenet/64/VIRTUAL_imagenet64_labeled.npz"}.items():
        assert CATALOGUE[name].url == openai + address
    assert "17XHwI5-IDpATRnBsxjOi6YCg1oD3MGC6" in CATALOGUE["ctm-imagenet64"].how and CATALOGUE["ctm-imagenet64"].url is None
    assert "1KPF3tWLRad3n18XJ1TD7J04XtoMIQ8QV" in CATALOGUE["ctm-imagenet64"].how


def test_entries_are_complete():
    formats = {"EDM pickle", "OpenAI state dict", "CTM, OpenAI state dict", "mu, sigma npz", "TorchScript", "npz", "consistency model (not a CTM)", "not loadable here (iDDPM pickle)"}
    for name, e in CATALOGUE.items():
        assert e.name == name and re.fullmatch("[a-z0-9-]+", name) and e.what and e.licence and e.file.startswith(name + ".")
        assert e.kind in {"teacher", "ctm", "cm", "reference", "features"} and e.loads_as in formats
        assert bool(e.url) != bool(e.how) and (e.url is None or urlsplit(e.url).scheme == "https")
        assert e.architecture == ({"channels_per_head": 64} if "OpenAI" in e.loads_as else {})
    assert len({e.file for e in CATALOGUE.values()}) == len({e.url for e in CATALOGUE.values()}) == len(CATALOGUE) == len(set(CATALOGUE.values()))


def test_names():
    assert is_public_name("ctm-imagenet64") and not is_public_name("ctm") and not is_public_name(Path("runs/x")) and not is_public_name("https://a.org/x")
    assert nearest_name("EDM-CIFAR10-32x32-cond-vq") == "edm-cifar10-32x32-cond-vp" and nearest_name("/tmp/x") is None
    with pytest.raises(ValueError, match="no public file is called 'ctm-imagenet46'; did you mean 'ctm-imagenet64'?"): fetch("ctm-imagenet46")


def test_table(host):
    host.cache.mkdir()
    (host.cache/"ctm-imagenet64.pt").write_bytes(b"PK" + bytes(1_999_998))
    for style in ("text", "markdown"):
        table = catalogue_table(style)
        for name, e in CATALOGUE.items():
            for cell in (name, e.kind, e.loads_as, e.licence, e.what, e.url or e.how): assert cell in table
        assert "2.0 MB" in table
    assert len({line.count("|") for line in catalogue_table("markdown").splitlines()}) == 1
    assert str(host.cache) in catalogue_table() and max(map(len, catalogue_table().splitlines())) < 250
    with pytest.raises(ValueError, match="style must be"): catalogue_table("html")


def test_cache_folder(host, monkeypatch, tmp_path):
    assert cache_folder() == host.cache
    monkeypatch.delenv("CTM_NB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path/".cache"/"ctm_nb"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"xdg"))
    assert cache_folder() == tmp_path/"xdg"/"ctm_nb"
    monkeypatch.setenv("CTM_NB_CACHE", "~/mine")
    assert cache_folder() == tmp_path/"mine"
    assert fetch("inception-2015-12-05", mirror=host.at, progress=False) == tmp_path/"mine"/"inception-2015-12-05.pt"


def test_fetch_by_name_and_by_address(host, monkeypatch):
    monkeypatch.setenv("CTM_NB_MIRROR", host.at + "/")
    path = fetch("edm-cifar10-32x32-cond-vp", progress=False)
    check(host, path=path)
    assert path == host.cache/"edm-cifar10-32x32-cond-vp.pkl" and host.get()[0][0] == "/edm-cifar10-32x32-cond-vp.pkl"
    one, two = (fetch(f"{host.at}/{a}/my%20model.pt", progress=False) for a in "ab")
    assert one != two and one.name.startswith("my_model-") and one.suffix == ".pt" and one.read_bytes() == BODY
    assert fetch(f"{host.at}/a/my%20model.pt", offline=True) == one and len(host.get()) == 3
    assert fetch(host.at, progress=False).name.startswith("download-")
    assert all(len(fetch(f"{host.at}/{'n'*n}.pt", progress=False).name) < 120 for n in (100, 1000))
    with pytest.raises(ValueError, match="url must be http"): fetch("ftp://a.org/x.pt")


def test_verify(host):
    path = fetch("inception-2015-12-05", mirror=host.at, progress=False)
    stat = path.stat()
    path.write_bytes(BODY[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fetch("inception-2015-12-05") == path
    with pytest.raises(DownloadError, match="has changed since"): fetch("inception-2015-12-05", verify=True)


@pytest.mark.parametrize("environment, offline", [({}, False), (dict(CTM_NB_OFFLINE="1"), True), (dict(CTM_NB_OFFLINE="TRUE"), True), (dict(CTM_NB_OFFLINE="0"), False),
                                                  (dict(HF_HUB_OFFLINE="1"), True), (dict(HF_HUB_OFFLINE="1", CTM_NB_OFFLINE="0"), False), (dict(CTM_NB_OFFLINE=""), False)])
def test_offline(host, monkeypatch, environment, offline):
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    assert offline_mode() == offline
    if offline:
        with pytest.raises(DownloadError, match=f"switched off.*fetch {host.at}/ct-imagenet64.pt elsewhere and put it at {host.cache}/ct-imagenet64.pt"):
            fetch("ct-imagenet64", mirror=host.at)
        assert host.get() == [] and not host.cache.exists()
    path = fetch("ct-imagenet64", mirror=host.at, offline=False, progress=False)
    assert fetch("ct-imagenet64", offline=True) == path and len(host.get()) == 1


def test_by_browser(host):
    with pytest.raises(DownloadError, match=f"needs a browser: open https://drive.google.com/file/d/.*/view in a browser.* put the file at {host.cache}/ctm-imagenet64.pt"):
        fetch("ctm-imagenet64")
    host.cache.mkdir()
    path = host.cache/"ctm-imagenet64.pt"
    path.write_bytes(b"<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title>")
    with pytest.raises(DownloadError, match=r"ctm-imagenet64.pt is a web page \('Google Drive - Virus scan warning'\)"): fetch("ctm-imagenet64")
    path.write_bytes(BODY)
    assert fetch("ctm-imagenet64") == path
    check(host, path=path)
    path.unlink()
    assert fetch("ctm-imagenet64", mirror=host.at, progress=False) == path and host.get()[0][0] == "/ctm-imagenet64.pt"
    check(host, path=path)


def test_the_commands_print_one_line(host, capfd):
    for call, code in ((lambda: fetch("ctm-imagenet64"), 3), (lambda: fetch("nothing-like-it"), 2)):
        with pytest.raises(SystemExit) as e, one_line_errors("ctm_nb_convert"): call()
        assert e.value.code == code and capfd.readouterr().err.count("\n") == 1


def test_the_catalogue_is_light():
    code = "import sys; from ctm_nb.checkpoints.catalogue import catalogue_table; catalogue_table(); print([m for m in ('torch', 'requests', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
