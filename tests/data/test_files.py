"""What stands for a file in records."""
import hashlib

import pytest

from ctm_nb.data.files import file_hash


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 5 * 2**20 + 3])
def test_a_hash_is_of_the_whole_file(tmp_path, size):
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "f").write_bytes(content[:size])
    assert file_hash(tmp_path / "f") == hashlib.sha256(content[:size]).hexdigest()
