"""The package in figures, before it moved into rooms and now:  python .ci/house.py [--limits]

Code lines are those that are neither empty nor only a comment nor a docstring. `--limits` fails if a limit of the
house is passed. What stood
before is read from git's history; a clone without it shows today's figures alone.
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
ROOMS = ("networks", "method", "data", "checkpoints", "evaluation", "training", "commands", "explore")


def code_lines(text):
    "Number of lines that hold code."
    docs = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            if isinstance(body[0].value.value, str): docs |= set(range(body[0].lineno, body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for n, line in lines if n not in docs and line.strip() and not line.strip().startswith("#"))


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


def measured(root):
    "{what: figure} of a tree with the folders nbs and ctm_nb."
    files = [p for p in sorted((root/"ctm_nb").rglob("*.py")) if p.name != "_modidx.py"]
    texts = {p: p.read_text(encoding="utf-8") for p in files}
    modules = {p: t for p, t in texts.items() if not p.name.startswith("_")}
    dotted = {p: ".".join(p.relative_to(root).with_suffix("").parts) for p in modules}
    books = {p: json.loads(p.read_text(encoding="utf-8")) for p in sorted((root/"nbs").rglob("[!_.]*.ipynb"))}
    prose = lambda nb: sum(len("".join(c["source"]).split()) for c in nb["cells"] if c["cell_type"] == "markdown")
    folders = {r: [p for p in modules if p.parent.name == r] for r in ROOMS}
    figures = {
        "modules": len(modules),
        "notebooks": len(books),
        "code lines": sum(map(code_lines, texts.values())),
        "longest line": max(len(line) for t in texts.values() for line in t.splitlines()),
        "modules in circles": len(
            in_circles({dotted[p]: imported(t, dotted[p], "ctm_nb") for p, t in modules.items()})
        ),
    }
    for room, here in folders.items():
        if here: figures[f"code lines of {room}"] = sum(code_lines(modules[p]) for p in here)
    method = [nb for p, nb in books.items() if p.parent.name == "1_method"]
    if method: figures["words of the chapter 1_method"] = sum(map(prose, method))
    return figures


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True)


def before():
    "The figures of BEFORE, or nothing where git does not have it; and the bytes of its files."
    done = git("archive", BEFORE)
    if done.returncode: return {}
    with tempfile.TemporaryDirectory() as d, tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(d, filter="data")
        size = sum(p.stat().st_size for p in Path(d).rglob("*") if p.is_file())
        return {**measured(Path(d)), "tracked files, MiB": round(size / 2**20, 1)}


def now():
    figures, done = measured(ROOT), git("ls-files", "-z")
    if done.returncode == 0:
        size = sum((ROOT/n).stat().st_size for n in done.stdout.decode().split("\0")[:-1] if (ROOT/n).is_file())
        figures["tracked files, MiB"] = round(size / 2**20, 1)
    return figures


LIMITS = {"code lines": 8200, "longest line": 120, "modules in circles": 0, "code lines of method": 1300}


def main(argv=None):
    p = argparse.ArgumentParser(description="The package in figures, before it moved into rooms and now.")
    p.add_argument("--limits", action="store_true", help="fail if a limit of the house is passed")
    limits = p.parse_args(argv).limits
    old, new = before(), now()
    head = f"{'':34}{'before':>10}{'now':>10}{'at most':>10}"
    rows = [f"{k:34}{old.get(k, ''):>10}{v:>10}{LIMITS.get(k, ''):>10}" for k, v in new.items()]
    sys.stdout.write("\n".join([head, *rows]) + "\n")
    passed = [f"{k}: {new[k]}, at most {v}" for k, v in LIMITS.items() if new[k] > v]
    if limits and passed: sys.exit("\n".join(passed))


if __name__ == "__main__": main()
