"""The package in figures, before it moved into rooms and now:  python .ci/house.py [--limits]

Code lines are those that are neither empty nor only a comment nor a docstring. `--limits` fails if a limit of the
house is passed. What stood before is read from git's history; a clone without it shows today's figures alone. What did
not exist then is listed in `NEW` and counted in the code: the house without it is compared with the goal of the move.
"""
import argparse
import ast
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "37a7a9299f58d05f396f86271ace39a5eb6c92cb"  # the last commit with all modules in one folder
# The notebooks of BEFORE that became the chapter 1_method, which has three more now: trajectories, eulerian, editing.
METHOD = ("00_flow", "03_edm", "04_together", "04_trajectory", "05_distances", "05_distill", "06_features", "06_gan",
          "07_guidance", "07_sampling")
ROOMS = ("networks", "method", "data", "checkpoints", "evaluation", "training", "commands", "explore")


# What came after BEFORE: its modules, and its definitions in others; a class with the methods patched into it. Whoever
# adds a feature adds it here.
NEW = {
    "Muon": "training.optimizers: NEWTON_SCHULZ orthogonalise MOMENTUM ADAM_SHARE TABLES _muon_groups Muon",
    "one pass": """method.balance: OutputLosses WholeGradients
        training.stages: Stage.in_one_pass DistillStage.in_one_pass""",
    "trajectories, eulerian, phases": """method.trajectories method.eulerian
        training.config: phases _phases_fit _uses_trajectories _dsm_first training.costs: student_cost
        training.stages: DistillStage.phase DistillStage.kinds _path_numbers _path_example _anchor _path_losses
        _tangent_numbers _tangent_example _tangent_losses Objective OBJECTIVES""",
    "kept trajectories": "training.stages: TrajectoryFolder commands.train: _paths",
    "a student without a teacher": "training.config: teacherless training.stages: _noise_example _noise_losses",
    "few at a time": "evaluation.features: at_once",
    "budget": """training.budget training.trainer: _goes_on commands.train: _minutes _own _budgeted
        evaluation.evaluate: _kept_reference""",
    "published adversary, recipe": """method.adversary: _frozen _seeded CrossMixing TokenMaps SpectralConv head_widths
        ScaleHead ProjectedDiscriminator DISCRIMINATORS method.balance: ApartGradients training.stages: GanStage.inherit
        networks.unet: Network.set_dropout Network.balance_layer OpenAIUNet.balance_layer data.images: BYTES
        data.read: LANCZOS evaluation.draw: _bytes_of""",
    "EDM2": """networks.edm2 checkpoints.models: _infer_edm2 _edm2_heads EDM2_NUMBERS
        checkpoints.catalogue: LATENTS method.teacher: uncertainty_loss training.presets: IMAGENET64_EDM2""",
    "averages": """checkpoints.averages training.config: LENGTH training.trainer: Trainer.snapshot_due Trainer.snapshot
        commands.train: _averages""",
    "trackers": "training.config: SERVICES training.trainer: Service",
    "guides": "method.guidance: autoguide training.config: _can_guide",
    "iDDPM": "method.teacher: iddpm_levels checkpoints.models: _first_half _range",
    "lite0, nearest": """evaluation.features: LITE0 lite0_file evaluation.metrics: nearest_points nearer_share
        evaluation.evaluate: Training Evaluator.remember Evaluator.nearest _nearest_grid commands.evaluate: _sheet""",
    "a page to play with": "evaluation.serve commands.sample: SERVED",
    "DINOv2": "evaluation.features: _standardised DINOv2Extractor _resize_pillow _fewer_places",
    "emoji": "training.presets: EMOJI",
    "ONNX and the page": """checkpoints.export commands.convert: EXPORTED _export_flags _refuse_export
        _export""",
    "Hub": """checkpoints.catalogue: HUB_FILE hub_file training.report: model_card
        commands.convert: _public _share""",
    "diffusers": """checkpoints.diffusers checkpoints.export: diffusers_folder diffusers_difference
        checkpoints.models: is_run _filtered _from_diffusers method.teacher: ddpm_levels
        method.trajectory: ConsistencyModel networks.unet: _StridedConv UNet._resized""",
    "safety of readers, labels": """data.read: ENCODINGS existing unpacked_limit LABEL_KEYS NAME_KEYS _columns _label_in
        _is_picture _as_bytes _stamp _prefix _of_prefixes _hint LMDB _lmdb_page lmdb_entries
        data.convert: folder_names _refuse_own _depth _remarks data.images: _letters evaluation.draw: _remove_parts
        checkpoints.models: _is_consistency_model""",
    "other forms, others' weights": """data.read: _bytes_at _inflate _mat_arrays PACKED _plain_tar _tables_in open_table
        checkpoints.foreign: _of_diffusers _states _rank _weights read_weights
        data.pickles: ANY Opaque _latin _odd checkpoints.unpickle: TORCH_NAMES""",
    "machines without double, without fork": "method.flow: NO_DOUBLE finest training.runtime: peak_memory",
    "editing": """method.editing evaluation.edit commands.sample: _edit_flags
        explore.explorer: canvas_pixels stroke_story explore_strokes explore""",
    "told before hours are spent": "commands.flags: check_output commands.train: _check_given _say_unused _heeded "
        "evaluation.evaluate: is_record _keep _splits evaluation.features: _known",
    "fine-tuning, more steps": """checkpoints.models: relabel training.stages: initial_model
        commands.train: _finished""",
    "known hashes": "checkpoints.catalogue: SHA256",
    "class accuracy of folders, what OUT can't be": "evaluation.reference: _own_labels evaluation.draw: _is_other_file",
    "a processor's order": """networks.blocks: channels_last_pays normalise joined silu_ method.flow: _Philox
        method.teacher: _of_number training.runtime: told_precision evaluation.features: keep_memory""",
    "a rule a solver, one graph": "method.solvers: hold RULES method.teacher: _is_number",
    "two at once, memory, a pulse": """data.files: claimed training.trainer: Trainer.claim Trainer.whereabouts
        checkpoints.models: of_newest commands.flags: Pulse training.costs: fit_memory training.runtime: Here.least""",
    "what the network is told": """method.trajectory: told_share CTM.__init__ CTM.told find_sigma_init
        training.config: LEVEL _is_positive _can_tell training.stages: DistillStage.sigma_init""",
    "sharded": """training.shard training.config: _shards training.stages: Stage.cut Stage.load_numbers Stage.step
        training.trainer: Trainer.whole_model Trainer.together Trainer.gather
        method.balance: BalancedGradients.differentiate BalancedGradients.at_last BalancedGradients.leave""",
    "blocks computed again": "training.runtime: recompute",
    "memory, counted": """training.costs: _like _norm _norm_backward _of_two _ATEN _AT_ONCE Meter IMAGES SCRATCH
        _prime _rows _no_numbers _peak_of Need _blank _KNOWN step_needs""",
}


def code_numbers(text):
    "Numbers of the lines that hold code."
    docs = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            docs |= set(range(first.lineno, first.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return {n for n, line in lines if n not in docs and line.strip() and not line.strip().startswith("#")}


def code_lines(text): return len(code_numbers(text))


def definitions(text):
    "{name: numbers of its lines} of functions, classes, methods as Class.method, and constants, decorators included."
    found = {}
    def note(name, node):
        first = min(n.lineno for n in (node, *getattr(node, "decorator_list", [])))
        found.setdefault(name, set()).update(range(first, node.end_lineno + 1))
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
            of = node.args.args[0].annotation if patched else None
            owner = of.id if isinstance(of, ast.Name) else ""
            if owner: note(owner, node)
            note(f"{owner}.{node.name}" if owner else node.name, node)
        elif isinstance(node, ast.ClassDef):
            note(node.name, node)
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef): note(f"{node.name}.{inner.name}", inner)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in ast.walk(ast.Tuple(targets)):
                if isinstance(name, ast.Name): note(name.id, node)
    return found


def new_lines(root):
    "{feature: {module: numbers of its lines of code}} of `NEW`; a name that is not in the code is an error."
    found, counted = {}, set()
    for feature, words in NEW.items():
        found[feature], module, known = {}, "", {}
        for word in words.split():
            if "." in word and word[0].islower():
                module = word.removesuffix(":")
                text = (root/"ctm_nb"/(module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
                known, code = definitions(text), code_numbers(text)
                if word.endswith(":"): continue
                lines = code
            elif word in known: lines = known[word] & code
            else: raise SystemExit(f"NEW[{feature!r}]: there is no {word} in {module}")
            lines = {n for n in lines if (module, n) not in counted}
            counted |= {(module, n) for n in lines}
            found[feature].setdefault(module, set()).update(lines)
    return found


def imported(text, name, package):
    "Modules of the package that a module imports anywhere, functions included."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = name.split(".")[:-node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
    return {f for f in found if f.startswith(package + ".")}


def in_circles(graph):
    """Modules that can reach themselves: what is left when those without imports, or without importers, are taken away
    again and again."""
    graph = {k: v & graph.keys() - {k} for k, v in graph.items()}
    while True:
        used = set().union(*graph.values()) if graph else set()
        ends = {k for k, v in graph.items() if not v or k not in used}
        if not ends: return sorted(graph)
        graph = {k: v - ends for k, v in graph.items() if k not in ends}


def longest_cell(book):
    "Lines of the longest exported cell that is more than a table: imports, functions or classes."
    sources = ("".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code")
    exported = [s for s in sources if s.lstrip().startswith("#| export")]
    table = lambda s: all(isinstance(n, (ast.Assign, ast.AnnAssign)) for n in ast.parse(s).body)
    return max((len(s.strip().splitlines()) - 1 for s in exported if not table(s)), default=0)


def measured(root):
    "{what: figure} of a tree with the folders nbs and ctm_nb."
    files = [p for p in sorted((root/"ctm_nb").rglob("*.py")) if p.name != "_modidx.py"]
    texts = {p: p.read_text(encoding="utf-8") for p in files}
    modules = {p: t for p, t in texts.items() if not p.name.startswith("_")}
    dotted = {p: ".".join(p.relative_to(root).with_suffix("").parts) for p in modules}
    books = {p: json.loads(p.read_text(encoding="utf-8")) for p in sorted((root/"nbs").rglob("[!_.]*.ipynb"))}
    prose = lambda nb: sum(len("".join(c["source"]).split()) for c in nb["cells"] if c["cell_type"] == "markdown")
    graph = {dotted[p]: imported(t, dotted[p], "ctm_nb") for p, t in modules.items()}
    figures = {
        "modules": len(modules),
        "notebooks": len(books),
        "code lines": sum(map(code_lines, texts.values())),
        "... without what is new": None,
        "longest line": max(len(line) for t in texts.values() for line in t.splitlines()),
        "longest exported cell": max(map(longest_cell, books.values())),
        "modules in circles": len(in_circles(graph)),
    }
    former = lambda p: p.parent == root/"nbs" and p.stem in METHOD
    method = [nb for p, nb in books.items() if p.parent.name == "1_method" or former(p)]
    if method: figures["words of the chapter 1_method"] = sum(map(prose, method))
    return figures


def by_room(root):
    "{room: its code lines, those of them that are new}, and {feature: its lines}."
    new = new_lines(root)
    count = lambda p: code_lines(p.read_text(encoding="utf-8"))
    later, rooms = [m for modules in new.values() for m, lines in modules.items() for _ in lines], {}
    for room in ROOMS:
        whole = sum(count(p) for p in (root/"ctm_nb"/room).glob("[!_]*.py"))
        rooms[room] = whole, sum(m.startswith(f"{room}.") for m in later)
    return rooms, {feature: sum(map(len, modules.values())) for feature, modules in new.items()}


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True)


def before():
    "The figures of BEFORE, or nothing where git does not have it; and the bytes of its files."
    done = git("archive", BEFORE)
    if done.returncode: return {}
    with tempfile.TemporaryDirectory() as d, tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(d, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        size = sum(p.stat().st_size for p in Path(d).rglob("*") if p.is_file())
        return {**measured(Path(d)), "tracked files, MiB": round(size / 2**20, 1)}


def now():
    figures, done = measured(ROOT), git("ls-files", "-z")
    if done.returncode == 0:
        size = sum((ROOT/n).stat().st_size for n in done.stdout.decode().split("\0")[:-1] if (ROOT/n).is_file())
        figures["tracked files, MiB"] = round(size / 2**20, 1)
    return figures


LIMITS = {"code lines": 10000, "... without what is new": 8200, "longest line": 120, "longest exported cell": 35,
          "modules in circles": 0, "code lines of method without what is new": 1300}
GOALS = dict(zip(ROOMS, (450, 1300, 1200, 1150, 1600, 1700, 500, 300)))  # of the move


def main(argv=None):
    p = argparse.ArgumentParser(description="The package in figures, before it moved into rooms and now.")
    p.add_argument("--limits", action="store_true", help="fail if a limit of the house is passed")
    limits = p.parse_args(argv).limits
    old, new, (rooms, features) = before(), now(), by_room(ROOT)
    old["... without what is new"] = ""
    new["... without what is new"] = new["code lines"] - sum(features.values())
    lines = [f"{'':34}{'before':>10}{'now':>10}{'at most':>10}"]
    lines += [f"{k:34}{old.get(k, ''):>10}{v:>10}{LIMITS.get(k, ''):>10}" for k, v in new.items()]
    lines += ["", f"{'code lines by room':34}{'now':>10}{'new':>10}{'without':>10}{'goal':>10}"]
    lines += [f"{r:34}{n:>10}{later:>10}{n - later:>10}{GOALS[r]:>10}" for r, (n, later) in rooms.items()]
    lines += ["", f"{'new since then':34}{'code lines':>10}", *(f"{k:34}{n:>10}" for k, n in features.items())]
    sys.stdout.write("\n".join(lines) + "\n")
    n, later = rooms["method"]
    figures = {**new, "code lines of method without what is new": n - later}
    passed = [f"{k}: {figures[k]}, at most {v}" for k, v in LIMITS.items() if figures[k] > v]
    if limits and passed: sys.exit("\n".join(passed))


if __name__ == "__main__": main()
