"""The short form of `two_at_once.py`, in a process of its own: it forks before torch has threads."""
from pathlib import Path

from warm import python


def test_of_two_writers_one_is_refused_and_readers_read():
    run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = python(run, Path(__file__).with_name("two_at_once.py"), "1", "1")
    assert done.returncode == 0 and "all as it should be" in done.stdout, done.stdout + done.stderr[-3000:]
