"""`python -c CODE WORD ...` without the seconds of its imports: forked from a process that has them behind it."""
import faulthandler
import gc
import logging
import multiprocessing.forkserver as server
import multiprocessing.util
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing import get_context, resource_tracker
from types import ModuleType
from unittest import mock

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload("""torch._dynamo torch.utils.tensorboard torchvision scipy.stats matplotlib.figure
    matplotlib.backends.backend_agg jinja2 safetensors.torch ctm_nb.training.budget ctm_nb.evaluation.evaluate
    ctm_nb.evaluation.edit ctm_nb.checkpoints.export ctm_nb.data.convert ctm_nb.commands.train ctm_nb.commands.sample
    ctm_nb.commands.evaluate ctm_nb.commands.data ctm_nb.commands.convert""".split())

STREAMS = 1, 2  # where what is imported found output and errors: pytest's files, at the time
with suppress(OSError): STREAMS = sys.stdout.fileno(), sys.stderr.fileno()


def begin():
    "Starts the server now, as a fork of this process, which has imported most of it; on Linux, where forks are safe."
    def fork(path, args, fds):
        if pid := os.fork(): return pid
        faulthandler.disable()  # pytest's
        sys.modules["__main__"] = ModuleType("__main__")  # nor is pytest what a process that is spawned should import
        for fd in {*range(3, 1000)} - {*fds, *STREAMS}:  # also what tells the server that this process has ended
            with suppress(OSError): os.close(fd)
        try: exec(args[-1], {})
        finally: os._exit(0)
    if sys.platform != "linux": return
    with mock.patch.dict(os.environ, PYTHONWARNINGS="ignore"): resource_tracker.ensure_running()  # some are killed
    with mock.patch.object(multiprocessing.util, "spawnv_passfds", fork): server.ensure_running()


class Python:
    "As subprocess.Popen([sys.executable, '-c', code, *words], ...), its output in files."
    def __init__(self, code, *words, cwd=None, env=None, largest_file=None):
        self.out, self.err = (tempfile.NamedTemporaryFile("r+") for _ in range(2))
        words, env = [str(w) for w in words], dict(os.environ if env is None else env)
        self.process = FORKED.Process(target=_become, args=(code, words, cwd, env, largest_file, self.out.name,
                                                            self.err.name))
        self.process.start()

    def end(self):
        self.process.join()
        with self.out, self.err:
            return subprocess.CompletedProcess("", self.process.exitcode, self.out.read(), self.err.read())


def _become(code, words, cwd, env, largest_file, *files):
    gc.freeze()  # what was imported is no garbage, and need not be looked through
    os.fsync = os.fstat  # see conftest.py
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for h in [*getattr(logger, "handlers", ())]:  # pytest's write to a file whose number is another's here
            if type(h).__module__.startswith("_pytest"): logger.removeHandler(h)
    if largest_file: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    for fd, name in enumerate((os.devnull, *files)): os.dup2(os.open(name, os.O_RDWR), fd)
    for fd, other in zip((1, 2), STREAMS): os.dup2(fd, other)
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, closefd=False) for fd, mode in enumerate("rww"))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may use nohup
    sys.argv = ["-c", *words]
    os.environ.clear()
    os.environ.update(env)
    if cwd: os.chdir(cwd)
    exec(code, {"__name__": "__main__"})


def python(code, *words, **how):
    "As subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True, ...)."
    return Python(code, *words, **how).end()


def ranks(code, *words, n=2, **how):
    "The same n times at once, told what torchrun tells."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        told = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(n),
                    LOCAL_WORLD_SIZE=str(n), GLOO_SOCKET_IFNAME="lo")
    started = [Python(code, *words, env={**os.environ, **told, "RANK": str(k), "LOCAL_RANK": str(k)}, **how)
               for k in range(n)]
    return [p.end() for p in started]
