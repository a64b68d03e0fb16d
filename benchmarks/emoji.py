"""Make the emoji that the package ships (ctm_nb/data/emoji.zip) from the pictures of Noto Emoji.

    npm pack emoji-datasource-google@16.0.0    # img/google/64, named by code points; emoji.json has categories
    python benchmarks/emoji.py FOLDER [OUT]

FOLDER holds a sub-folder for each category, in it NAME__VARIANT.png. Pictures are put on white, brought to 32 x 32 and
kept losslessly as WebP, as train/CATEGORY/NAME__VARIANT.webp and test/CATEGORY/...: every tenth emoji of a category is
held out, with all of its variants (skin tones), so that no near-duplicate of a training picture is in the test set.
"""
import sys
import zipfile
from io import BytesIO
from pathlib import Path

from PIL import Image

SIDE, EVERY = 32, 10
NOTICE = """Pictures of Noto Emoji, Copyright Google Inc., Apache License 2.0 (https://github.com/googlefonts/noto-emoji),
by way of the npm package emoji-datasource-google 16.0.0. Changed: put on white, resized to 32 x 32, re-encoded as WebP.
"""


def picture(path: Path) -> bytes:
    "A picture on white, small, as lossless WebP."
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    small = Image.alpha_composite(white, image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = BytesIO()
    small.save(data, "webp", lossless=True, quality=100, method=6)
    return data.getvalue()


def main(folder: Path, out: Path):
    counts = {"train": 0, "test": 0}
    with zipfile.ZipFile(out, "w") as z:
        z.writestr(zipfile.ZipInfo("NOTICE.txt"), NOTICE)  # without the time of day: the same bytes every time
        for category in sorted(p for p in folder.iterdir() if p.is_dir()):
            files = sorted(category.glob("*.png"))
            emoji = sorted({f.stem.split("__")[0] for f in files})
            held_out = set(emoji[EVERY // 2::EVERY])
            for f in files:
                split = "test" if f.stem.split("__")[0] in held_out else "train"
                z.writestr(zipfile.ZipInfo(f"{split}/{category.name}/{f.stem}.webp"), picture(f))
                counts[split] += 1
    size = out.stat().st_size / 2**20
    print(f"{out}: {counts['train']} training and {counts['test']} held-out pictures, {size:.1f} MiB")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3): sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "ctm_nb/data/emoji.zip"))
