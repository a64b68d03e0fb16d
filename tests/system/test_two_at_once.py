"""The short form of `two_at_once.py`, in a process of its own: it forks before torch has threads."""
import os
import subprocess
import sys
from pathlib import Path


def test_of_two_writers_one_is_refused_and_readers_read():
    words = [sys.executable, Path(__file__).with_name("two_at_once.py"), "1", "1"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "all as it should be" in done.stdout, done.stdout + done.stderr[-3000:]
