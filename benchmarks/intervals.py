"""How far the teacher's solver is from the trajectory after an interval, against its evaluations: on the exact
mixture, and on trained teachers with their students.

    python benchmarks/intervals.py --teachers runs/digits runs/mnist
    python benchmarks/intervals.py --teachers runs/digits runs/mnist --reference  # what they are worth

Errors of x_u and of the student's target made from it, means over six intervals that stand for the published draw of
k, against 272 steps of 2M even in ln t; `--reference` compares those with four times as many. `--data` is where the
images of runs are that don't find theirs. Written to nbs/results/speed/solvers.json and reference.json.
"""
import argparse
import json
from pathlib import Path

import torch
from spacings import curvature, spaced_times
from unipc import solve_any

from ctm_nb.checkpoints.models import load
from ctm_nb.data.batches import load_data
from ctm_nb.method.distill import ctm_pair, draw_indices
from ctm_nb.method.flow import grid_time, perturb, toy_mixture
from ctm_nb.method.solvers import nfe, solve

OUT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "speed"
INTERVALS = (5, 8, 11, 13, 15, 16)  # the middles of six equally likely parts of the draw of k, for N = 18
FEW = (3, 4, 5, 6, 8, 10, 11, 12, None)
# name -> (solver, at most so many evaluations, spacing); dpm is 2M, dpm3 3M, unipc has a corrector
PLANS = {"heun, full grid": ("heun", None, "grid"), **{f"heun, {n}": ("heun", n, "grid") for n in (4, 8, 12, 16)},
         **{f"{m}, {how}, {n or 'full'}": (m, n, how) for m, how in (
             ("dpm", "grid"), ("dpm", "log"), ("dpm3", "log"), ("unipc2", "log"), ("unipc3", "log"),
             ("unipc2", "curved")) for n in FEW}}


def rms(d): return d.flatten(1).square().mean(1).sqrt()


def mean(v): return sum(v) / len(v) if v else None


def fine_solution(D, x_t, t, u, y, steps=272):
    "The teacher's trajectory from t to u by many steps of 2M, even in ln t."
    times = t * (u / t) ** torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
    return solve(D, x_t, times.float(), y, "dpmpp_2m", above_zero=True)


def interval_errors(D, x0, y, curve, student=None, N=18):
    "Mean error and NFE of every plan, of the target too with a student."
    gen, rows = torch.Generator().manual_seed(0), {p: {"evals": [], "x_u": [], "target": []} for p in PLANS}
    for k in INTERVALS:
        i, j = draw_indices(len(x0), k, N, gen)
        t, u, s = (grid_time(v, N) for v in (i, i + k, j))
        x_t = perturb(x0, t.float(), torch.randn(x0.shape, generator=gen))
        def ends(x, at=(x_t, t, u, s)):
            x_t, *times = at
            return ctm_pair(student, student, x_t, x, *(v.float() for v in times), y=y)[1]
        exact = fine_solution(D, x_t, t, u, y)
        goal = ends(exact) if student else None
        for p, (method, most, spacing) in PLANS.items():
            alike = "heun" if method == "heun" else "dpmpp_2m"  # its cost is the same
            times = spaced_times(i, k, N, alike, most, spacing, curve)
            x_u = solve_any(D, x_t, times.float(), y, method)
            rows[p]["evals"].append(nfe(alike, times))
            rows[p]["x_u"].append(float(rms(x_u - exact).mean()))
            if student: rows[p]["target"].append(float(rms(ends(x_u) - goal).mean()))
    return {p: {k: mean(v) for k, v in row.items()} for p, row in rows.items()}


def reference_errors(D, x0, y, N=18):
    "What errors are measured against, and Heun's solution, beside one with four times the steps."
    gen, found = torch.Generator().manual_seed(0), {"272 steps": [], "heun, full grid": []}
    for k in INTERVALS:
        i, _ = draw_indices(len(x0), k, N, gen)
        t, u = (grid_time(v, N) for v in (i, i + k))
        x_t = perturb(x0, t.float(), torch.randn(x0.shape, generator=gen))
        finest = fine_solution(D, x_t, t, u, y, 64 * 17)
        grid = spaced_times(i, k, N, "heun", None, "grid").float()
        found["272 steps"].append(float(rms(fine_solution(D, x_t, t, u, y) - finest).mean()))
        found["heun, full grid"].append(float(rms(solve(D, x_t, grid, y, "heun", above_zero=True) - finest).mean()))
    return {k: mean(v) for k, v in found.items()}


def cases(teachers, data, n):
    "Name, denoiser, images, labels, curvature and student of the mixture and of every run."
    toy = toy_mixture()
    yield "mixture", toy.D, toy.sample(256, seed=1).float(), None, curvature(toy), None
    for run in map(Path, teachers):
        config = json.loads((run / "config.json").read_text())["data"]
        source = config["source"] if config["source"] == "digits" or not data else data
        images = load_data(source, "train", config["image_size"])
        ids = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]
        teacher = load(run, which="teacher")
        y = images.labels[ids] if teacher.n_classes else None
        yield run.name, teacher.D, images.x0(ids), y, curvature(teacher), load(run, which="ctm")


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teachers", nargs="*", default=[], help="runs, with their students")
    p.add_argument("--data", help="where the images of the runs are")
    p.add_argument("-n", type=int, default=24, help="images for each of the six intervals")
    p.add_argument("--reference", action="store_true", help="the error of the reference instead")
    a = p.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    path = OUT / f"{'reference' if a.reference else 'solvers'}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, D, x0, y, curve, student in cases(a.teachers, a.data, a.n):
        made = {"errors": reference_errors(D, x0, y)} if a.reference else {
            "rows": interval_errors(D, x0, y, curve, student)}
        found[name] = {"samples": len(INTERVALS) * len(x0), **made}
        print(name, found[name], flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
