"""Check the types of the exported modules:  python .ci/typecheck.py [mypy's flags]

A checker doesn't know what `@patch` does, so it is shown a copy of the package in which each patched method stands
in its class; lines in its messages are those of the real files. The scripts of benchmarks/, which tests don't run,
are held to what they name of the package: attributes, arguments, modules.
"""
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_NAMES = r"\w+\.py.*(\[(attr-defined|call-arg|name-defined)\]|ctm_nb.*\[import-not-found\])$"


def patched(node):
    "The class that a function is patched into, and its decorators as they would stand there; None for other functions."
    if not isinstance(node, ast.FunctionDef): return None
    for d in node.decorator_list:
        call = d if isinstance(d, ast.Call) else None
        if (
            getattr(call.func if call else d, "id", "") != "patch"
            or not node.args.args
            or not node.args.args[0].annotation
        ):
            continue
        kinds = [
            k
            for k in ("cls_method", "as_prop", "set_prop", "static_method")
            if call and any(w.arg == k for w in call.keywords)
        ]
        return ast.unparse(node.args.args[0].annotation), {
            "cls_method": ["@classmethod"],
            "as_prop": ["@property"],
            "static_method": ["@staticmethod"],
        }.get(kinds[0] if kinds else "", [])
    return None


def moved(code):
    "Code with its patched functions inside their classes, and the number of the original line of each line."
    tree, lines = ast.parse(code), code.splitlines()
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    goes, after = {}, {}  # line: None where it is cut; last line of a class: what follows it
    for n in tree.body:
        found = patched(n)
        if not found or found[0] not in classes: continue
        owner, decorators = found
        for i in range(min(d.lineno for d in n.decorator_list), n.end_lineno + 1): goes[i] = None
        text = [(f"    {d}", n.lineno) for d in decorators] + [
            ("    " + lines[i - 1] if lines[i - 1].strip() else "", i) for i in range(n.lineno, n.end_lineno + 1)
        ]
        after.setdefault(classes[owner].end_lineno, []).extend(text)
    out = []
    for i, line in enumerate(lines, 1):
        if i not in goes: out.append((line, i))
        out += after.get(i, [])
    return "\n".join(t for t, _ in out) + "\n", [i for _, i in out]


def main():
    with tempfile.TemporaryDirectory() as d:
        where = {}
        (folder := Path(d)/"ctm_nb").mkdir()
        for p in sorted((ROOT/"ctm_nb").rglob("*.py")):
            name = p.relative_to(ROOT/"ctm_nb").as_posix()
            code, where[name] = moved(p.read_text(encoding="utf-8"))
            (folder/name).parent.mkdir(exist_ok=True)
            (folder/name).write_text(code, encoding="utf-8")
        for p in (ROOT/"benchmarks").glob("*.py"): shutil.copy(p, d)
        command = lambda *words: [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--cache-dir",
            str(ROOT / ".mypy_cache"),
            "--no-pretty",
            "--hide-error-context",
            *sys.argv[1:],
            *words,
        ]
        call = lambda *words: subprocess.run(command(*words), cwd=d, capture_output=True, text=True)
        done = call("ctm_nb")
        scripts = call("--check-untyped-defs", *(p.name for p in Path(d).glob("*.py")))
        wrong = [f"benchmarks/{l}" for l in scripts.stdout.splitlines() if re.match(OF_NAMES, l)]
    real = lambda m: f"ctm_nb/{m[1]}:{where[m[1]][int(m[2]) - 1]}:"
    sys.stdout.write(re.sub(r"^ctm_nb/([\w/]+\.py):(\d+):", real, done.stdout, flags=re.M))
    sys.stdout.write("".join(f"{l}\n" for l in wrong) + scripts.stdout * (scripts.returncode > 1))
    sys.stderr.write(done.stderr + scripts.stderr)
    sys.exit(done.returncode or len(wrong) > 0 or scripts.returncode > 1)


if __name__ == "__main__": main()
