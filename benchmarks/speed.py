"""What a training step and a sample cost, on any machine. Results are JSON files under nbs/results/speed/ that
nbs/9_experiments/03_speed.ipynb reads.

    python benchmarks/speed.py all
        a machine's ceiling, each network against it, the step and its parts, memory, sampling, start-up,
        data, evaluation; and a picture, nbs/results/speed/machine.png
    python benchmarks/speed.py device networks                          some of these
    python benchmarks/speed.py solvers --teachers runs/digits
        error of the teacher's solver interval against its evaluations: on the exact mixture, and on trained
        teachers
    python benchmarks/speed.py reference --teachers runs/digits         error of what those errors are measured against

Every section keeps what the others have written. All times are medians (of two, the slower), with the fastest and
slowest beside them; whatever is compared is timed in turn, in one process. `--threads` sets the threads of a CPU,
`--file` names the results of a second machine. Nothing else should run meanwhile; where that can't be had,
`--threads 1 --processor-time` counts the processor's seconds instead of the clock's.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

OUT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "speed"
SIDE_64 = dict(
    image_size=64, model_channels=32, channel_mult=(1, 2, 3, 4), n_blocks=3, attention=(32, 16, 8), channels_per_head=16
)
NETWORKS = {
    "ddpmpp 32, 32 x 32": ("ddpmpp", dict(image_size=32, model_channels=32)),
    "ddpmpp 64, 32 x 32": ("ddpmpp", dict(image_size=32, model_channels=64)),
    "ncsnpp 32, 32 x 32": ("ncsnpp", dict(image_size=32, model_channels=32)),
    "adm 32, 64 x 64": ("adm", SIDE_64),
    "openai 32, 64 x 64": ("openai", SIDE_64),
}
RECIPES = {
    "published": ["distill.solver=heun", "distill.max_evals=none", "distill.distance=l2"],
    "eleven evaluations": ["distill.solver=dpm", "distill.max_evals=11"],
    "3M": ["distill.solver=dpm3"],
    "five evaluations": ["distill.solver=dpm", "distill.max_evals=5"],
}
FILE = ["machine"]  # of the results, see --file
CLOCK = [time.perf_counter]  # or time.process_time, see --processor-time
INTERVALS = (5, 8, 11, 13, 15, 16)  # the middles of six equally likely parts of the draw of k, for N = 18


def machine():
    "What was measured on."
    names = (
        [l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": CLOCK[0].__name__,
    }


def keep(section, value, file=None):
    "Write one section of a results file."
    path = OUT / f"{file or FILE[0]}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                **found,
                section: {
                    "machine": machine(),
                    "command": " ".join(["python benchmarks/speed.py", *sys.argv[1:]]),
                    **value,
                },
            },
            indent=1,
        )
        + "\n"
    )


def spread(times):
    "Median, fastest, slowest."
    times = sorted(times)
    return {"median": times[len(times) // 2], "least": times[0], "most": times[-1]}


def in_turn(jobs, repeats, warm=1):
    "Seconds of each of several functions, called one after the other, so that a change of the machine hits all."
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times = {k: [] for k in jobs}
    for r in range(warm + repeats):
        for k, f in jobs.items():
            wait()
            started = CLOCK[0]()
            f()
            wait()
            if r >= warm:
                times[k].append(CLOCK[0]() - started)
    return {k: spread(v) for k, v in times.items()}


def device_section(a):
    "What the machine can do at best: a large matrix product, a convolution of the networks' kind, a copy."
    n, x, w = 2048, torch.randn(16, 128, 32, 32, device=a.device), torch.randn(128, 128, 3, 3, device=a.device)
    m, big = torch.randn(n, n, device=a.device), torch.randn(64 * 2**20, device=a.device)
    from ctm_nb.training.runtime import unpacks

    half = [v.bfloat16() for v in (m, x, w)]
    jobs = {
        "matmul fp32": lambda: m @ m,
        "conv fp32": lambda: torch.nn.functional.conv2d(x, w, padding=1),
        "copy": big.clone,
    }
    if not unpacks(torch.device(a.device)):
        jobs |= {
            "matmul bf16": lambda: half[0] @ half[0],
            "conv bf16": lambda: torch.nn.functional.conv2d(*half[1:], padding=1),
        }
    t = in_turn(jobs, a.repeats)
    flops = {"matmul": 2 * n**3, "conv": 2 * 16 * 32 * 32 * 128 * 128 * 9}
    keep(
        "device",
        {
            "gflops": {k: flops[k.split()[0]] / v["median"] / 1e9 for k, v in t.items() if k != "copy"},
            "copy_gb_per_s": 2 * 4 * big.numel() / t["copy"]["median"] / 1e9,
            "seconds": t,
        },
    )


def count(net, B):
    "Floating-point operations of one forward pass."
    from torch.utils.flop_counter import FlopCounterMode

    c = net.config
    with FlopCounterMode(display=False) as f, torch.no_grad():
        net(torch.randn(B, 3, c["image_size"], c["image_size"]), torch.zeros(B))
    return f.get_total_flops()


def network_section(a):
    "Forward, and forward with backward, of each network."
    from ctm_nb.networks.families import build_network
    from ctm_nb.training.runtime import unpacks

    rows = {}
    for name, (family, kw) in NETWORKS.items():
        torch.manual_seed(0)
        net = build_network(family, channels=3, **kw).eval()
        flops, net = count(net, a.batch), net.to(a.device)
        x, t = (
            torch.randn(a.batch, 3, kw["image_size"], kw["image_size"], device=a.device),
            torch.zeros(a.batch, device=a.device),
        )

        def forward(context):
            with torch.no_grad(), context():
                net(x, t)

        def both(context):
            with context():
                loss = net(x, t).float().square().mean()
            loss.backward()

        def embedding():
            with torch.no_grad():
                net._embeddings(t)

        formats = {"fp32": nullcontext} | (
            {}
            if unpacks(torch.device(a.device))
            else {"bf16": partial(torch.autocast, a.device, torch.bfloat16)}
        )
        times = in_turn(
            {f"{n} {p}": partial(f, c) for n, f in (("forward", forward), ("both", both)) for p, c in formats.items()}
            | {"embedding": embedding},
            a.repeats,
        )
        rows[name] = {
            "parameters": sum(p.numel() for p in net.parameters()),
            "batch": a.batch,
            "flops": flops,
            "seconds": times,
        }
        print(name, {k: round(v["median"], 3) for k, v in times.items()}, flush=True)
    keep("networks", {"rows": rows})


# ---- one training step


def make_stage(channels, recipe, device, batch, adversary=False):
    "A distillation of CIFAR-10's network with fewer channels, on noise; or the stage after it, with an adversary."
    from ctm_nb.training.config import make_config
    from ctm_nb.data.images import ImageData
    from ctm_nb.method.teacher import Denoiser
    from ctm_nb.training.stages import STAGE_CLASSES, make_network
    from ctm_nb.method.trajectory import student_from

    words = [
        f"network.model_channels={channels}",
        f"distill.batch={batch}",
        "network.dropout=0",
        "network.augment_dim=0",
        "teacher.augment=0",
        "distill.init=teacher",
        "distill.distance=l2",
        *RECIPES[recipe],
    ]
    if adversary:
        words += [
            f"gan.batch={batch}",
            "gan.features=teacher",
            "gan.start=1",
            "gan.head_start=0",
        ]  # step 0 without the adversary, 1 the discriminator's turn, 2 the student's
    config = make_config("cifar10", ["data.source=digits", *words])
    data = ImageData(
        torch.randint(0, 256, (batch, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte(), None, [], "noise"
    )
    torch.manual_seed(0)
    net = make_network(config, data)
    for p in net.parameters():
        p.data.add_(0.02 * torch.randn(p.shape))  # no layer is silent
    parts = {"teacher": Denoiser(net)}
    if adversary:
        parts["ctm"] = student_from(parts["teacher"])
    return STAGE_CLASSES["ctm_dsm_gan" if adversary else "ctm_dsm"](config, data, torch.device(device), parts)


def numbers_with(stage, k, seed, step=None):
    "What a step draws, for a solver interval of k grid steps; the same times and noise for every `step` of a stage."
    import ctm_nb.training.stages as stages
    from ctm_nb.method.distill import draw_indices

    kept, stages.draw_interval = (
        stages.draw_interval,
        lambda B, N, K, gen, *rest: (ij := draw_indices(B, k, N, gen)) and (ij[0], k, ij[1]),
    )
    try:
        return stages.carry_to(
            stage.draw(len(stage.data), stages.step_generator(0, seed), seed if step is None else step), stage.device
        )
    finally:
        stages.draw_interval = kept


def plain_step(stage, numbers, x0):
    "The published step, written down as its formulas stand."
    from ctm_nb.method.balance import balance
    from ctm_nb.method.distances import l2
    from ctm_nb.method.distill import dsm_loss
    from ctm_nb.method.solvers import solve
    from ctm_nb.method.flow import perturb

    teacher, student, target = (stage.parts[k] for k in ("teacher", "model", "target"))
    e, end = numbers, torch.full_like(numbers["s"], 0.002)
    t = e["times"][:, 0]
    x_t = perturb(x0, t, e["start"])
    with torch.no_grad():
        x_u = solve(teacher.D, x_t, e["times"].T, None, "heun")
        goal = target.G(student.G(x_u, e["u"], e["s"]), e["s"], end)
    ctm = l2(target.G(student.G(x_t, t, e["s"]), e["s"], end), goal).mean()
    dsm = dsm_loss(student, x0, e["sigma"], e["eps"]).mean()
    grads = [torch.autograd.grad(v, student.net.last_layer, retain_graph=True)[0] for v in (ctm, dsm)]
    (ctm + balance(*grads) * dsm).backward()
    finish_plain(stage)


def finish_plain(stage):
    "Optimizer and averages, one parameter after the other."
    stage.optimizers["model"].step()
    stage.optimizers["model"].zero_grad()
    with torch.no_grad():
        for ema in stage.emas.values():
            for p, q in zip(ema.module.parameters(), stage.parts["model"].parameters()):
                p.mul_(0.999).add_(q, alpha=0.001)


def our_step(stage, numbers, x0, context=nullcontext, micro=None):
    "The package's step."
    from ctm_nb.training.runtime import Guard
    from ctm_nb.training.stages import take
    from ctm_nb.training.step import apply_gradient, gradient

    optimizer, B = stage.optimizers["model"], len(x0)
    optimizer.zero_grad(set_to_none=True)
    rows = [slice(i, i + (micro or B)) for i in range(0, B, micro or B)]

    def examples():
        for r in rows:
            with context():
                e = stage.example(x0[r], None, take(numbers, r), 0)
            yield e

    out = gradient(stage, examples(), 0, [1 / len(rows)] * len(rows), context)
    apply_gradient(stage, 0, out, Guard(stage.device), 0)


def jobs_of(channels, a):
    "Every kind of step on one network: name -> (stage, function of numbers and images)."
    stages = {r: make_stage(channels, r, a.device, a.batch) for r in RECIPES}
    half = partial(torch.autocast, a.device, torch.bfloat16, cache_enabled=a.device != "cpu")
    out = {"plain": (stages["published"], plain_step), **{r: (s, our_step) for r, s in stages.items()}}
    from ctm_nb.training.runtime import unpacks

    if not unpacks(torch.device(a.device)):
        out |= {f"{r}, bf16": (s, partial(our_step, context=half)) for r, s in stages.items()}
    if a.compiled:
        from ctm_nb.training.runtime import compile_networks

        for r in RECIPES:
            s = make_stage(channels, r, a.device, a.batch)
            x0, numbers = torch.rand(a.batch, 3, 32, 32, device=a.device), numbers_with(s, 2, 0)

            def trial():
                our_step(s, numbers, x0, half)

            if not compile_networks([s.parts[k] for k in ("model", "target", "teacher")], trial):
                sys.exit("not compiled: see above")
            out |= {f"{r}, bf16, compiled": (s, partial(our_step, context=half))}
    return {k: (s, lambda numbers, x0, s=s, f=f: f(s, numbers, x0)) for k, (s, f) in out.items()}


def step_section(a):
    "Images a second of every kind of step, over six intervals that stand for the draw of k."
    for channels in a.channels:
        jobs, x0, total = jobs_of(channels, a), torch.rand(a.batch, 3, 32, 32, device=a.device) * 2 - 1, {}
        for k in INTERVALS:
            calls = {n: partial(f, numbers_with(s, k, k), x0) for n, (s, f) in jobs.items()}
            for n, t in in_turn(calls, a.repeats, warm=int(k == INTERVALS[0])).items():
                total.setdefault(n, []).append(t)
            print(channels, k, {n: round(v[-1]["median"], 2) for n, v in total.items()}, flush=True)
        rate = lambda ts, which: a.batch * len(ts) / sum(t[which] for t in ts)
        keep(
            f"steps {channels}",
            {
                "batch": a.batch,
                "stretches": INTERVALS,
                "images_per_sec": {
                    n: {"median": rate(ts, "median"), "least": rate(ts, "most"), "most": rate(ts, "least")}
                    for n, ts in total.items()
                },
            },
        )


def parts_section(a):
    "The cost of one step by part."
    from ctm_nb.method.balance import BalancedGradients
    from ctm_nb.method.distill import ctm_pair, dsm_loss

    for channels in a.channels:
        rows = {}
        for recipe in RECIPES:
            stage = make_stage(channels, recipe, a.device, a.batch)
            x0, numbers = torch.rand(a.batch, 3, 32, 32, device=a.device) * 2 - 1, numbers_with(stage, 12, 0)
            student, target, made = stage.parts["model"], stage.parts["target"], {}
            e = stage.example(x0, None, numbers, 0)
            gradients = BalancedGradients(student.parameters(), student.net.last_layer)

            def teacher():
                made.update(e=stage.example(x0, None, numbers, 0))

            def ctm():
                made["ctm"] = stage.distance(
                    *ctm_pair(student, target, *(e[k] for k in ("x_t", "x_u", "t", "u", "s")))
                ).mean()

            def dsm():
                made["dsm"] = dsm_loss(student, x0, e["sigma"], e["eps"]).mean()

            def backward():
                gradients.add({k: made[k] for k in ("ctm", "dsm")})

            def balance():
                gradients.combine()

            def optimizer():
                stage.optimizers["model"].step()

            def averages():
                [ema.update(student) for ema in stage.emas.values()]

            rows[recipe] = in_turn(
                {
                    "data and draw": lambda: numbers_with(stage, 12, 0),
                    "teacher": teacher,
                    "CTM, forward": ctm,
                    "DSM, forward": dsm,
                    "backward": backward,
                    "balance": balance,
                    "optimizer": optimizer,
                    "averages": averages,
                },
                a.repeats,
            )
        keep(f"parts {channels}", {"batch": a.batch, "k": 12, "rows": rows})


def adversary_section(a):
    "The turns of the adversarial stage, the teacher's solver interval apart, and a line of the log."
    for channels in a.channels:
        stage, x0 = (
            make_stage(channels, "five evaluations", a.device, a.batch, adversary=True),
            torch.rand(a.batch, 3, 32, 32, device=a.device) * 2 - 1,
        )
        turns = {"student": 0, "student, with an adversary": 2, "discriminator": 1}
        made = {n: stage.example(x0, None, numbers_with(stage, 12, 0, n), n) for n in turns.values()}

        def turn(n):
            gradients = stage.gradients(n)
            gradients.add(stage.losses(made[n], n))
            gradients.combine(**stage.bounds)
            stage.optimizers[part := stage.learner(n)].step()
            stage.optimizers[part].zero_grad()

        jobs = {
            "teacher": lambda: stage.example(x0, None, numbers_with(stage, 12, 0, 0), 0),
            **{k: partial(turn, n) for k, n in turns.items()},
        }
        keep(
            f"adversary {channels}",
            {
                "batch": a.batch,
                "k": 12,
                "log_every": stage.config.run.log_every,
                "seconds": in_turn(jobs | line_of_the_log(stage), a.repeats),
            },
        )


def line_of_the_log(stage):
    "Everything that run.log_every steps leave behind: the drift of the averages, a line of metrics.jsonl, TensorBoard."
    from ctm_nb.training.config import make_config
    from ctm_nb.training.trainer import Trainer

    trainer = Trainer(make_config("tiny", ["gan.steps=100"]), tempfile.mkdtemp(prefix="speed-"))
    state = trainer.state
    state.stage = stage
    keys = "loss loss_ctm loss_dsm loss_gan lambda_dsm lambda_gan grad_norm lr teacher_evals".split()
    numbers = {"stage": stage.name, **dict.fromkeys(keys, 1.0)}

    def write():
        state.step, state.seconds = state.step + stage.config.run.log_every, state.seconds + 1.0
        state.window = [dict(numbers) for _ in range(stage.config.run.log_every)]
        trainer.log_window()

    return {"a line of the log": write}


def memory_section(a):
    "Peak memory of a step over what the networks themselves need, each in a process of its own."
    from ctm_nb.training.runtime import unpacks

    rows, half = {}, ("eleven evaluations, bf16",) * (not unpacks(torch.device(a.device)))
    for channels in a.channels:
        for kind in ("plain", "published", "eleven evaluations", "in parts of half", "in parts of a quarter", *half):
            line = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "one-memory",
                    kind,
                    str(channels),
                    "--batch",
                    str(a.memory_batch),
                    "--device",
                    a.device,
                ],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            rows[f"{channels}, {kind}"] = json.loads(line.splitlines()[-1])
            print(channels, kind, rows[f"{channels}, {kind}"], flush=True)
            keep("memory", {"batch": a.memory_batch, "rows": rows})


def micro_section(a):
    "What it costs to make a step in parts: the whole, halves, quarters."
    for channels in a.channels:
        stage, x0 = (
            make_stage(channels, "five evaluations", a.device, a.memory_batch),
            torch.rand(a.memory_batch, 3, 32, 32, device=a.device) * 2 - 1,
        )
        numbers = numbers_with(stage, 12, 0)
        jobs = {
            name: partial(our_step, stage, numbers, x0, micro=a.memory_batch // n if n > 1 else None)
            for name, n in (("whole", 1), ("in parts of half", 2), ("in parts of a quarter", 4))
        }
        keep(f"micro {channels}", {"batch": a.memory_batch, "k": 12, "seconds": in_turn(jobs, a.repeats)})


def one_memory(kind, channels, a):
    "MiB of resident memory that one step adds, after a step of a single image has loaded everything."
    parts = {"in parts of half": 2, "in parts of a quarter": 4}
    stage = make_stage(
        channels, "published" if kind in ("plain", "published") else "eleven evaluations", a.device, a.batch
    )
    half = partial(torch.autocast, a.device, torch.bfloat16, cache_enabled=False) if "bf16" in kind else nullcontext
    step = (
        plain_step
        if kind == "plain"
        else partial(our_step, context=half, micro=a.batch // parts[kind] if kind in parts else None)
    )
    x0, numbers = torch.rand(a.batch, 3, 32, 32, device=a.device) * 2 - 1, numbers_with(stage, 2, 0)
    small = {k: v[:1] for k, v in numbers.items()}
    (plain_step if kind == "plain" else partial(our_step, context=half))(stage, small, x0[:1])
    if a.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(stage, numbers, x0)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(stage, numbers, x0)
        peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps({"mib": peak / 2**20}))


def sampling_section(a):
    "Sampling against the bare calls of the network."
    from ctm_nb.method.sampling import sample

    rows = {}
    for channels in a.channels:
        m = make_stage(channels, "published", a.device, 1).parts["model"].eval()
        for steps in (1, 2, 4, 18):
            x, t = torch.randn(a.batch, 3, 32, 32, device=a.device), torch.full((a.batch,), 1.0, device=a.device)

            def bare():
                with torch.no_grad():
                    for _ in range(steps):
                        m(x, t, t / 2)

            times = in_turn(
                {
                    "bare": bare,
                    "sample": lambda: (
                        sample(m, a.batch, steps=steps, batch_size=a.batch, device=a.device)
                        if a.device != "cpu"
                        else sample(m, a.batch, steps=steps, batch_size=a.batch)
                    ),
                },
                a.repeats,
            )
            rows[f"{channels}, {steps}"] = {
                "images_per_sec": a.batch / times["sample"]["median"],
                "overhead": times["sample"]["median"] / times["bare"]["median"] - 1,
                "seconds": times,
            }
            print(channels, steps, rows[f"{channels}, {steps}"]["overhead"], flush=True)
    keep("sampling", {"batch": a.batch, "rows": rows})


def start_section(a):
    "Seconds, by the clock, until a command has printed its help."
    commands = [
        Path(sys.executable).with_name(f"ctm_nb_{c}") for c in ("train", "sample", "evaluate", "data", "convert")
    ]
    call = lambda c: subprocess.run([str(c), "--help"], check=True, stdout=subprocess.DEVNULL)
    kept, CLOCK[0] = CLOCK[0], time.perf_counter
    try:
        keep("start", {"seconds": in_turn({c.name: partial(call, c) for c in commands}, 2 * a.repeats)})
    finally:
        CLOCK[0] = kept


def others_section(a):
    "What has a benchmark of its own: how fast images arrive, and how fast samples are scored."
    for script in ("data.py", "metrics.py"):
        subprocess.run([sys.executable, str(Path(__file__).with_name(script))], check=True)


def picture(a):
    "What the results file holds, at a glance."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads((OUT / f"{FILE[0]}.json").read_text())
    groups = {
        f"a training step, {k[6:]} channels": {n: r["median"] for n, r in v["images_per_sec"].items()}
        for k, v in found.items()
        if k.startswith("steps ")
    }
    groups |= {
        f"a training step with k = {v['k']}, {k[6:]} channels": {
            r: v["batch"] / sum(t["median"] for t in parts.values()) for r, parts in v["rows"].items()
        }
        for k, v in found.items()
        if k.startswith("parts ")
    }
    if "sampling" in found:
        groups["sampling"] = {
            f"{k.split(', ')[0]} channels, {k.split(', ')[1]} steps": v["images_per_sec"]
            for k, v in found["sampling"]["rows"].items()
        }
    if not groups:
        return
    fig, axs = plt.subplots(len(groups), 1, figsize=(7, 2.0 * len(groups) + 1), squeeze=False)
    for ax, (name, rows) in zip(axs[:, 0], groups.items()):
        ax.barh(list(rows), list(rows.values()))
        ax.invert_yaxis()
        ax.tick_params(labelsize=7)
        ax.set_title(f"{name}: images a second", fontsize=9)
    fig.tight_layout()
    fig.savefig(OUT / f"{FILE[0]}.png", dpi=120)


# ---- error of the teacher's solver interval

# name -> (solver, at most so many evaluations, spacing, how much finer than the grid)
PLANS = {
    "heun, full grid": ("heun", None, "grid", 1),
    "heun, full grid, bf16": ("heun", None, "grid", 1),
    **{f"heun, {n}": ("heun", n, "grid", 1) for n in (4, 8, 12, 16)},
    **{
        f"{m}, grid, {n or 'full'}": (m, n, "grid", 1)
        for m in ("dpm", "dpm3")
        for n in (3, 4, 5, 6, 8, 10, 11, 12, None)
    },
    **{
        f"{m}, log, {n or 'full'}": (m, n, "log", 1)
        for m in ("dpm", "dpm3", "unipc2", "unipc3")
        for n in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, None)
    },
    **{
        f"{m}, curved, {n or 'full'}": (m, n, "curved", 1)
        for m in ("dpm", "unipc2")
        for n in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, None)
    },
    **{f"{m}, log, twice, {n}": (m, n, "log", 2) for m in ("dpm3", "unipc3") for n in (8, 9, 10, 11, 12, 14)},
    **{
        f"{p}, bf16": (m, n, w, 1)
        for p, m, n, w in (
            ("dpm, log, 11", "dpm", 11, "log"),
            ("dpm3, log, full", "dpm3", None, "log"),
            ("unipc2, curved, 11", "unipc2", 11, "curved"),
            ("unipc3, log, full", "unipc3", None, "log"),
        )
    },
}


def fine_solution(D, x_t, t, u, y, steps=272):
    "The teacher's trajectory from t to u by many steps of 2M, even in ln t."
    from ctm_nb.method.solvers import solve

    times = t * (u / t) ** torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
    return solve(D, x_t, times.float(), y, "dpmpp_2m", above_zero=True)


def interval_errors(D, x0, y, curve, student=None, target=None, N=18, seed=0):
    "Mean error and NFE of every plan, over intervals that stand for the draw of k; the target's too, with a student."
    from spacings import spaced_times
    from ctm_nb.method.distill import ctm_pair, draw_indices
    from ctm_nb.method.solvers import nfe
    from unipc import solve_any
    from ctm_nb.method.flow import grid_time, perturb

    gen, rows, B = (
        torch.Generator().manual_seed(seed),
        {p: {"evals": [], "x_u": [], "target": []} for p in PLANS},
        len(x0),
    )
    rms = lambda d: d.flatten(1).square().mean(1).sqrt()
    plans = {p: v for p, v in PLANS.items() if "bf16" not in p or torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    for k in INTERVALS:
        i, j = draw_indices(B, k, N, gen)
        t, u, s = (grid_time(v, N) for v in (i, i + k, j))
        x_t = perturb(x0, t.float(), torch.randn(x0.shape, generator=gen))
        ends = lambda x: ctm_pair(student, target, x_t, x, t.float(), u.float(), s.float(), y)[1]
        with torch.no_grad():
            exact = fine_solution(D, x_t, t, u, y)
            goal = ends(exact) if student else None
            for p, (method, most, spacing, finer) in plans.items():
                times = spaced_times(
                    finer * i,
                    finer * k,
                    finer * (N - 1) + 1,
                    "heun" if method == "heun" else "dpmpp_2m",
                    most,
                    spacing,
                    curve,
                )  # their cost is the same
                with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in p, cache_enabled=False):
                    x_u = solve_any(D, x_t, times.float(), y, method)
                rows[p]["evals"].append(nfe("heun" if method == "heun" else "dpmpp_2m", times))
                rows[p]["x_u"].append(float(rms(x_u - exact).mean()))
                if student:
                    rows[p]["target"].append(float(rms(ends(x_u) - goal).mean()))
    mean = lambda v: sum(v) / len(v) if v else None
    return {p: {k: mean(v) for k, v in rows[p].items()} for p in plans}


def cases(a):
    "Name, denoiser, images, labels, curvature and student of the mixture and of every teacher."
    from spacings import curvature
    from ctm_nb.method.flow import toy_mixture
    from ctm_nb.method.trajectory import is_ctm
    from ctm_nb.data.read import open_source  # noqa: F401  (fails early where data can't be read)
    from ctm_nb.checkpoints.models import load
    from ctm_nb.data.batches import load_splits

    toy = toy_mixture()
    yield "mixture", toy.D, toy.sample(256, seed=1).float(), None, curvature(toy), None
    for path in a.teachers:
        run = Path(path)
        config = json.loads((run / "config.json").read_text())
        data = load_splits(a.data or config["data"]["source"], config["data"]["image_size"])["train"]
        ids = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: a.solver_batch]
        teacher = load(run, which="teacher")
        try:
            student = load(run)
        except ValueError:
            student = None
        yield (
            run.name,
            teacher.D,
            data.x0(ids),
            data.labels[ids] if teacher.n_classes else None,
            curvature(teacher),
            student if student and is_ctm(student) else None,
        )


def solver_section(a):
    "The mixture with its exact denoiser, and trained teachers with their students."
    for name, D, x0, y, curve, student in cases(a):
        rows = interval_errors(D, x0, y, curve, student, student)
        keep(name, {"samples": len(INTERVALS) * len(x0), "rows": rows}, "solvers")
        print(name, {p: (round(r["evals"], 1), round(r["x_u"], 5)) for p, r in rows.items()}, flush=True)


def reference_section(a):
    "How good is what errors are measured against? Its distance, and Heun's, from a solution with 4 times the steps."
    from spacings import spaced_times
    from ctm_nb.method.distill import draw_indices
    from ctm_nb.method.solvers import solve
    from ctm_nb.method.flow import grid_time, perturb

    rms = lambda d: d.flatten(1).square().mean(1).sqrt()
    for name, D, x0, y, *_ in cases(a):
        gen, found = torch.Generator().manual_seed(0), {"272 steps": [], "heun, full grid": []}
        for k in INTERVALS:
            i, _ = draw_indices(len(x0), k, 18, gen)
            t, u = (grid_time(v, 18) for v in (i, i + k))
            x_t = perturb(x0, t.float(), torch.randn(x0.shape, generator=gen))
            with torch.no_grad():
                finest = fine_solution(D, x_t, t, u, y, 64 * 17)
                found["272 steps"].append(float(rms(fine_solution(D, x_t, t, u, y) - finest).mean()))
                found["heun, full grid"].append(
                    float(
                        rms(
                            solve(
                                D,
                                x_t,
                                spaced_times(i, k, 18, "heun", None, "grid", None).float(),
                                y,
                                "heun",
                                above_zero=True,
                            )
                            - finest
                        ).mean()
                    )
                )
        keep(
            name,
            {"samples": len(INTERVALS) * len(x0), "errors": {k: sum(v) / len(v) for k, v in found.items()}},
            "reference",
        )
        print(name, found, flush=True)


if __name__ == "__main__":
    sections = {
        "device": device_section,
        "networks": network_section,
        "steps": step_section,
        "parts": parts_section,
        "adversary": adversary_section,
        "memory": memory_section,
        "micro": micro_section,
        "sampling": sampling_section,
        "start": start_section,
        "others": others_section,
        "solvers": solver_section,
        "reference": reference_section,
    }
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="+", help=f"all (but solvers and reference), {', '.join(sections)}")
    p.add_argument("--file", default="machine", help="name of the results under nbs/results/speed/")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, help="of a CPU")
    p.add_argument("--processor-time", action="store_true")
    p.add_argument(
        "--compiled", action="store_true", help="time the steps with compiled networks too (minutes of compiling)"
    )
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--memory-batch", type=int, default=32)
    p.add_argument("--channels", type=int, nargs="+", default=[32, 64])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--solver-batch", type=int, default=32, help="images for each of the six intervals, for the solvers")
    p.add_argument("--teachers", nargs="*", default=[], help="folders of runs")
    p.add_argument("--data", help="where the images of the runs are now")
    a = p.parse_args()
    torch.set_flush_denormal(True)
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.processor_time:
        CLOCK[0] = time.process_time
    if a.what[0] == "one-memory":
        one_memory(a.what[1], int(a.what[2]), a)
        sys.exit()
    FILE[0] = a.file
    if a.what == ["all"]:
        a.what = [k for k in sections if k not in ("solvers", "reference")]
    if unknown := [w for w in a.what if w not in sections]:
        p.error(f"unknown: {', '.join(unknown)}; there are {', '.join(sections)}")
    for w in a.what:
        sections[w](a)
    if not {*a.what} <= {"solvers", "reference"} and (OUT / f"{a.file}.json").exists():
        picture(a)
