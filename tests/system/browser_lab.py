"""JupyterLab on a free port and a browser in front of it, for test_browser.py."""
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen

try: from playwright.sync_api import TimeoutError, expect
except ImportError: TimeoutError = expect = OSError  # `missing` says so; the tests are skipped

SETTINGS = {"apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
            "notebook-extension/tracker": '{"windowingMode": "none"}'}  # cells out of sight stay in the page
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing() -> str:
    "Why there can be no browser test here; empty if there can."
    try: import playwright  # noqa: F401
    except ImportError: return "playwright is not installed (`make browser` installs it)"
    names = ", ".join(BROWSERS)
    if not browser_path():
        return f"no browser: none of {names} is in PATH, and CTM_NB_BROWSER is not set (`make browser` installs one)"
    return ""


def browser_path():
    "A browser of the system, or the one that playwright has downloaded; None without either."
    if found := os.environ.get("CTM_NB_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None): return found
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p: own = p.chromium.executable_path
    return own if os.path.exists(own) else None


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyter_lab(folder, home):
    "JupyterLab on `folder`, its own settings in `home`; yields the address."
    port, log = free_port(), open(home/"lab.log", "w")
    for name, text in SETTINGS.items():
        (file := home/"settings"/"@jupyterlab"/f"{name}.jupyterlab-settings").parent.mkdir(parents=True)
        file.write_text(text)
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "run",
              "IPYTHONDIR": "ipython"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(home/v) for k, v in places.items()}}
    server_app = {"port_retries": 0, "password": "", "root_dir": folder}
    lab_app = {"news_url": None, "extension_manager": "readonly", "workspaces_dir": home/"workspaces",
               "user_settings_dir": home/"settings"}
    words = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token="]
    words += [f"--ServerApp.{k}={v}" for k, v in server_app.items()] + [f"--LabApp.{k}={v}" for k, v in lab_app.items()]
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], stdout=log, stderr=log, env=env)
    try:
        for _ in range(240):
            if server.poll() is not None:
                raise RuntimeError(f"JupyterLab ended:\n{(home/'lab.log').read_text()[-2000:]}")
            try:
                urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
                break
            except OSError: time.sleep(.5)
        else: raise RuntimeError(f"JupyterLab did not answer:\n{(home/'lab.log').read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


@contextmanager
def page(width=1400, height=1000):
    "A page of a headless browser."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-dev-shm-usage"])
        try: yield browser.new_page(viewport=dict(width=width, height=height))
        finally: browser.close()
