"""A folder with one file of everything: what is a picture is read, the rest is named, and nothing falls over."""
import sys
from pathlib import Path

from ctm_nb.commands.data import ctm_nb_data
from ctm_nb.data.convert import survey
from ctm_nb.data.read import open_source

sys.path.insert(0, str(Path(__file__).parents[1] / "system"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from files import everything  # noqa: E402
from fuzz import limited  # noqa: E402


def test_a_folder_with_one_file_of_everything(tmp_path):
    good, bad, others = everything(tmp_path)
    facts = survey(open_source(tmp_path), workers=0)
    why = facts["broken"]
    assert (facts["images"], len(why)) == (good + bad, bad) and facts["sizes"]["16 x 24"] == 1  # turned upright
    for name, word in {"photo.heic": "pip install pillow-heif", "evil.png": "%!PS", "empty.png": "empty file",
                       "text.jpg": "dear", "half.jpg": "truncated", "bomb.png": "decompression bomb",
                       "pipe.png": "a pipe", "page.gif": "<!DOC",
                       "photoshop.tif": "8BPS", "gone.png": "can't be opened"}.items():
        assert word in why[name], (name, why[name])
    assert facts["copies"]["png.PNG"] == facts["copies"]["copy of png.png"] == "pixel by pixel a png.jpg"
    left = next(n for n in facts["notes"] if "are no images" in n)
    assert left.startswith(f"{sum(not n.startswith(('.', '__')) for n in others)} files are no images")
    how, said = limited(ctm_nb_data, ["inspect", str(tmp_path), "--workers", "0"], memory=2**29)
    assert how == "refused" and all(c.isprintable() or c == "\n" for c in said) and "\\x1b[31m.png: " in said
