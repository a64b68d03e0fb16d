"""Memory an image: how the peak of each command's work grows with the number of images, for tiny images, so that
only what is kept about them counts.

    python benchmarks/memory.py [--images 50000 200000]
        writes nbs/results/data/memory.json and prints it as a table

Every measurement is a process of its own; its peak is that of the process and of the largest of its workers. The
growth from the smaller to the larger data set, divided by the images in between, is what a million images cost
beyond the program itself (about 50 to 400 MB, depending on whether torch is needed).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "data"


def write(path, n):
    "An EDM zip of n images of 2 x 2 in ten classes."
    import numpy as np

    from ctm_nb.data.convert import dataset_json, edm_name, png, store

    blobs = [png(np.full((2, 2, 1), v, np.uint8)) for v in range(256)]

    def entries():
        yield from ((edm_name(i), blobs[i % 256]) for i in range(n))
        yield "dataset.json", dataset_json((i % 10 for i in range(n)), list("abcdefghij"))

    with open(path, "wb") as f:
        store(f, entries())


def open_zip(path, n):
    from ctm_nb.data.read import open_source

    assert len(open_source(path)) == n


def inspect(path, n):
    from ctm_nb.data.read import open_source
    from ctm_nb.data.convert import survey

    assert len(survey(open_source(path))["classes"]) == 10


def convert(path, n):
    from ctm_nb.data.convert import convert as work
    from ctm_nb.data.read import open_source

    assert work(open_source(path), path.with_suffix(".copy.zip"), overwrite=True)["images"] == n


def stream(path, n):
    from ctm_nb.data.batches import Batches, load_splits

    os.environ["CTM_NB_CACHE"] = str(path.parent / "cache")
    os.makedirs(path.parent / "cache", exist_ok=True)
    batches = Batches(load_splits(path, in_memory=False)["train"], 128)
    for k in range(100):
        batches.at(k * 128)
    batches.close()


WORK = {f.__name__: f for f in (write, open_zip, inspect, convert, stream)}
WORDS = {
    "write": "convert.store writes",
    "open_zip": "an EDM zip is opened",
    "inspect": "ctm_nb_data inspect",
    "convert": "ctm_nb_data convert, zip to zip",
    "stream": "a stream delivers 100 batches",
}


def peak():
    "Of this process and of the largest of its children that have ended, in bytes."
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, nargs=2, default=[50_000, 200_000])
    a = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as d:
        for name in WORK:
            found = [
                int(
                    subprocess.run(
                        [sys.executable, __file__, "one", name, str(Path(d) / f"{n}.zip"), str(n)],
                        check=True,
                        capture_output=True,
                        text=True,
                    ).stdout
                )
                for n in a.images
            ]
            rows.append(
                {
                    "what": WORDS[name],
                    "peak MB": [round(v / 1e6) for v in found],
                    "bytes an image": round((found[1] - found[0]) / (a.images[1] - a.images[0])),
                }
            )
            print(rows[-1], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "memory.json").write_text(
        json.dumps(
            {"command": " ".join(["python benchmarks/memory.py", *sys.argv[1:]]), "images": a.images, "rows": rows},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        WORK[sys.argv[2]](Path(sys.argv[3]), int(sys.argv[4]))
        print(peak())
    else:
        main()
