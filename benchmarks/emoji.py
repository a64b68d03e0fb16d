"""The emoji in colour: make the data that the package ships, and keep what a run on them reached.

    npm pack emoji-datasource-google@16.0.0       # img/google/64, named by code points; emoji.json has categories
    python benchmarks/emoji.py data FOLDER        # writes ctm_nb/data/emoji.zip
    ctm_nb_train --preset emoji
    python benchmarks/emoji.py results runs/emoji # writes nbs/results/emoji; of a student of another run's teacher
                                                  # (--teacher runs/NAME) the teacher's minutes and curve as well
    python benchmarks/emoji.py results runs/cifar10 --out cifar10 --no-weights  # of pictures that may not be shipped

FOLDER holds a sub-folder for each category, in it NAME__VARIANT.png. Pictures are put on white, brought to 32 x 32 and
kept losslessly as WebP, as train/CATEGORY/NAME__VARIANT.webp and test/CATEGORY/...: every tenth emoji of a category is
held out, with all of its variants (skin tones), so that no near-duplicate of a training picture is in the test set.
"""
import argparse
import json
import shutil
import zipfile
from io import BytesIO
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
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


def make_data(folder: Path, out: Path):
    "The archive of pictures."
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


def draw(run: Path, columns: int = 20, scale: int = 2) -> Image.Image:
    "The same noise, classes as often as in the data, drawn by the teacher in 17 evaluations, the student in 1, 2, 4."
    import torch

    from ctm_nb import load, sample
    from ctm_nb.data.images import image_grid, to_uint8
    from ctm_nb.data.read import open_source
    teacher, student = load(run, which="teacher"), load(run)
    source = json.loads((run / "config.json").read_text())["data"]["source"]
    labels = torch.from_numpy(open_source(source).labels).sort().values
    y = labels[((torch.arange(columns) + .5) * len(labels) / columns).long()]
    ways = [(teacher, dict(solver="heun", steps=9)), *((student, dict(steps=k)) for k in (1, 2, 4))]
    rows = torch.cat([to_uint8(sample(m, n=len(y), y=y, seed=0, **how)) for m, how in ways])
    grid = Image.fromarray(image_grid(rows, len(y)))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def settings(run: Path) -> dict:
    "The configuration of a run, without the places of its teacher and its pictures on this machine."
    config = json.loads((run / "config.json").read_text())
    if source := config["teacher"]["source"]: config["teacher"]["source"] = f"runs/{Path(source).name}"
    config["data"]["source"] = Path(config["data"]["source"]).name
    return config


def small_copy(run: Path, out: Path):
    "The student in half precision, 4 MB: a sample moves by less than half a grey level."
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ctm_nb import load
    from ctm_nb.checkpoints.models import save_model
    whole = save_model(load(run), out.with_name("whole.safetensors"), settings(run))
    with safe_open(whole, "pt") as f:
        halves = {k: f.get_tensor(k).half() for k in f.keys()}  # noqa: SIM118
        save_file(halves, out, metadata=f.metadata())
    whole.unlink()


def logged(run: Path) -> list:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def keep_results(run: Path, out: Path, weights: bool = True):
    "Picture, scores, curve, minutes and, if wanted, student of a run."
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "scores.json", out / "scores.json")
    (out / "config.json").write_text(json.dumps(settings(run), indent=1) + "\n")
    lines, source = logged(run), json.loads((run / "config.json").read_text())["teacher"]["source"]
    if source:
        before = [line for line in logged(Path(source)) if line["stage"] == "teacher"]
        lines = before + [{**line, "seconds": line["seconds"] + before[-1]["seconds"]} for line in lines]
    kept = ("stage", "step", "loss_edm", "loss_ctm", "loss_dsm", "seconds", "peak_memory_mb")
    curve = [{k: line[k] for k in kept if k in line} for line in lines if line["step"] % 100 == 0]
    (out / "curve.json").write_text(json.dumps(curve))
    cpu = next(t for t in Path("/proc/cpuinfo").read_text().splitlines() if t.startswith("model name")).split(":")[1]
    about = {"minutes": lines[-1]["seconds"] / 60, "hardware": f"{cpu.strip()}, one thread, beside other programs"}
    (out / "run.json").write_text(json.dumps(about))
    if weights: small_copy(run, out / "student.safetensors")
    draw(run).save(out / "final.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "results"))
    parser.add_argument("folder", type=Path, help="the pictures, or the run")
    parser.add_argument("--out", default="emoji", help="of the results: a folder in nbs/results")
    parser.add_argument("--no-weights", action="store_true", help="of the results: without the student")
    a = parser.parse_args()
    if not a.folder.is_dir(): parser.error(f"no folder {a.folder}")
    if a.what == "data": make_data(a.folder, ROOT / "ctm_nb" / "data" / "emoji.zip")
    else: keep_results(a.folder, ROOT / "nbs" / "results" / a.out, not a.no_weights)


if __name__ == "__main__": main()
