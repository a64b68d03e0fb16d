"""What stands for a file in records."""
import time
import json
import os
import hashlib
from pathlib import Path

import pytest
from filelock import FileLock

from ctm_nb.data.files import claimed, file_hash


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 5 * 2**20 + 3])
def test_a_hash_is_of_the_whole_file(tmp_path, size):
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "f").write_bytes(content[:size])
    assert file_hash(tmp_path / "f") == hashlib.sha256(content[:size]).hexdigest()


def test_whoever_has_only_just_begun_to_write_is_named(tmp_path, monkeypatch):
    "Its note comes a moment after its lock."
    note = tmp_path / ".lock.by"
    by = json.dumps(dict(pid=1, host="there", since="today"))
    monkeypatch.setattr(time, "sleep", lambda _: note.write_text(by))
    with FileLock(tmp_path / ".lock"), pytest.raises(OSError, match="by process 1 on there, since today"):
        with claimed(tmp_path / ".lock", "a run"): pass


@pytest.mark.parametrize("folder, what", [("gone", FileNotFoundError), ("file", NotADirectoryError)])
def test_a_lock_that_can_not_be_made_is_not_one_that_is_held(tmp_path, monkeypatch, folder, what):
    "And what is written is named, not the lock."
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(type(tmp_path), "mkdir", lambda *a, **k: None)  # as where one may not
    with pytest.raises(what) as e:
        with claimed(tmp_path / folder / ".x.lock", "x.png"): pass
    assert "'x.png'" in str(e.value) and "another process" not in str(e.value) and ".lock" not in str(e.value)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_where_no_file_can_be_the_error_says_so():
    with pytest.raises(OSError, match="'/proc/x.png'"):
        with claimed(Path("/proc/.x.png.lock"), "/proc/x.png"): pass
