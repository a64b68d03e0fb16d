"""Every benchmark can be started: what it imports is there, and it says what it measures."""
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
WITHOUT_COMMAND = {"spacings"}  # functions that others use


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.stem)
def test_a_benchmark_says_what_it_measures(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(str(FOLDER))
    if path.stem in WITHOUT_COMMAND:
        runpy.run_path(str(path), run_name="__main__")
        return
    with pytest.raises(SystemExit) as e: runpy.run_path(str(path), run_name="__main__")
    assert e.value.code == 0 and "usage:" in capsys.readouterr().out
