"""Local, global and soft matching, with and without the denoising loss, against the exact flow of a Gaussian mixture.

    python benchmarks/oracle.py --seeds 0 1 2 --steps 1000

writes nbs/results/oracle/runs.json after each of the 21 runs, some ten minutes on one core; what is there is kept.
nbs/9_experiments/01_oracle.ipynb shows these functions and reads the result. Three runs of each of the six variants
with the same number of steps, and global matching with the denoising loss once more, for as many steps as make the
teacher's work that of soft matching.
"""
import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from ctm_nb.method.balance import BalancedGradients
from ctm_nb.method.distances import pseudo_huber
from ctm_nb.method.distill import MATCHING, draw_interval, dsm_sigma, interval_times, solve_interval, step_losses
from ctm_nb.method.flow import GaussianMixture, grid_time, perturb, rho_grid, toy_mixture
from ctm_nb.method.teacher import Denoiser
from ctm_nb.method.trajectory import CTM, student_from
from ctm_nb.networks.unet import MLP

RESULT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "oracle" / "runs.json"
LEVELS = (80., 20., 5., 2., 1., .5, .2, .05, .002)  # noise levels at which maps are compared


def toy_example(
    toy: GaussianMixture,  # data and teacher
    x0: Tensor,  # (B, d) clean data
    matching: str,  # one of MATCHING
    gen: torch.Generator,  # source of randomness (CPU)
    N: int = 18,  # points of the time grid
) -> tuple[dict, int]:  # arguments of `step_losses`, NFE of the teacher
    "One batch on the mixture with the exact teacher's answer."
    draw = lambda *shape: torch.randn(*shape, generator=gen)
    i, k, j = draw_interval(len(x0), N, N - 1, gen, matching)
    t, u, s = (grid_time(v, N).float() for v in (i, i + k, j))
    x_t = perturb(x0, t, draw(*x0.shape))
    times = interval_times(i, k, N, "dpmpp_2m")
    x_u = solve_interval(toy.D, x_t, times, None, "dpmpp_2m")
    sigma = dsm_sigma(draw(len(x0)), torch.rand(len(x0), generator=gen))
    return dict(x_t=x_t, x_u=x_u, t=t, u=u, s=s, x0=x0, sigma=sigma, eps=draw(*x0.shape)), len(times) - 1


def train_on(
    toy: GaussianMixture,  # data and teacher
    matching: str = "soft",  # one of MATCHING
    dsm: bool = True,  # add the denoising loss
    seed: int = 0,  # of weights and batches
    steps: int = 1000,  # optimizer steps
    batch: int = 128,  # samples a step
    lr: float = 4e-3,  # at the peak
    example=toy_example,  # makes a batch
) -> tuple[CTM, float]:  # the EMA of the student, mean NFE of the teacher a step
    "Distil the exact denoiser of a mixture into a small MLP.  # CTM: training"
    torch.manual_seed(seed)
    student = student_from(Denoiser(MLP(toy.dim, width=64, n_blocks=3)))
    ema, gen = copy.deepcopy(student).requires_grad_(False), torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(student.parameters(), lr, betas=(.9, .99), weight_decay=0.)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps, pct_start=.1)
    data, total = toy.sample(10000, seed=seed), 0.
    gradients = BalancedGradients(student.parameters(), student.net.last_layer)
    for step in range(steps):
        e, nfe = example(toy, data[torch.randint(len(data), (batch,), generator=gen)], matching, gen)
        gradients.add(step_losses(student, ema, **e, distance=pseudo_huber, dsm=dsm))
        gradients.combine()
        opt.step()
        schedule.step()
        rate = min(.99, (1 + step) / (10 + step))
        for p, q in zip(ema.parameters(), student.parameters()): p.data.lerp_(q.data, 1 - rate)
        total += nfe / steps
    return ema, total


def exact_maps(
    toy: GaussianMixture,  # whose flow it is
    n: int = 150,  # points a level
    levels: tuple = LEVELS,  # decreasing
) -> dict:  # (t, s) -> (x_t, x_s), each (n, d) float64
    "Test points at every level and where the exact flow takes them."
    gen, out = torch.Generator().manual_seed(1), {}
    for a, t in enumerate(levels[:-1]):
        x_t = x = toy.sample(n, seed=8) + t * torch.randn(n, toy.dim, dtype=torch.float64, generator=gen)
        for r, s in zip(levels[a:], levels[a + 1:]):
            x = toy.flow(x, r, s)
            out[t, s] = x_t, x
    return out


@torch.no_grad()
def map_error(
    m,  # the student: m.G(x, t, s)
    maps: dict,  # from `exact_maps`
    levels: tuple = LEVELS,  # those of `maps`
) -> Tensor:  # (T, T), row t, column s; nan where s >= t
    "Median distance of the student's jumps from the exact ones."
    out = torch.full((len(levels), len(levels)), float("nan"))
    for (t, s), (x_t, x_s) in maps.items():
        out[levels.index(t), levels.index(s)] = (m.G(x_t.float(), t, s) - x_s).norm(dim=1).median()
    return out


@torch.no_grad()
def denoiser_error(
    m,  # the student: m.D(x, t)
    toy: GaussianMixture,  # with the exact denoiser
    levels: Tensor,  # (T,) noise levels
    n: int = 400,  # points a level
) -> Tensor:  # (T,)
    "Root mean square distance of g(x, t, t) from the exact denoiser."
    gen, x0 = torch.Generator().manual_seed(2), toy.sample(n, seed=9)
    noisy = [x0 + t * torch.randn(n, toy.dim, generator=gen) for t in levels]
    return torch.stack([(m.D(x, t) - toy.D(x, t)).square().sum(1).mean().sqrt() for x, t in zip(noisy, levels)])


@torch.no_grad()
def sample_error(
    m,  # the student: m.G(x, t, s)
    x_T: Tensor,  # (n, d) starting points at the first time
    end: Tensor,  # (n, d) where the exact flow takes them
    steps: int,  # jumps, on the rho-grid
) -> float:
    "Median distance between the end of a chain of jumps and the end of the exact trajectory."
    times, x = rho_grid(steps + 1).tolist(), x_T
    for t, s in zip(times, times[1:]): x = m.G(x, t, s)
    return float((x - end).norm(dim=1).median())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="of the optimizer")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULT)
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    toy, levels = toy_mixture(), torch.logspace(torch.tensor(.002).log10(), torch.tensor(80.).log10(), 16)
    maps, x_T = exact_maps(toy), 80 * torch.randn(400, 2, generator=torch.Generator().manual_seed(3))
    end = toy.flow(x_T.double(), 80., .002)
    runs = json.loads(a.out.read_text())["runs"] if a.out.exists() else []
    jobs = [(matching, dsm, seed, False) for seed in a.seeds for matching in MATCHING for dsm in (True, False)]
    for matching, dsm, seed, equal_work in [*jobs, *(("global", True, seed, True) for seed in a.seeds)]:
        alike = [r for r in runs if r["steps"] == a.steps]
        work = {m: sum(r["teacher_evals"] for r in alike if r["matching"] == m) for m in MATCHING}
        steps = round(a.steps * work["soft"] / work["global"]) if equal_work else a.steps
        key = dict(matching=matching, dsm=dsm, seed=seed, steps=steps, batch=a.batch)
        if any(key.items() <= r.items() for r in runs): continue
        started = time.process_time()
        student, nfe = train_on(toy, matching, dsm, seed, steps, a.batch)
        spent = time.process_time() - started
        error = [[None if v != v else v for v in row] for row in map_error(student, maps).tolist()]
        runs.append({**key, "teacher_evals": nfe, "cpu_seconds": spent, "map": error,
                     "denoiser": denoiser_error(student, toy, levels).tolist(),
                     "samples": {n: sample_error(student, x_T, end, n) for n in (1, 2, 4, 18)}})
        about = {"command": "python benchmarks/oracle.py", "torch": torch.__version__, "levels": LEVELS}
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps({**about, "denoiser_levels": levels.tolist(), "runs": runs}) + "\n")


if __name__ == "__main__": main()
