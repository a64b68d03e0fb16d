"""The package read as text: modules, definitions, parameters with their comments, equations named. Nothing of it is
imported."""
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

CELL = re.compile(r"^# %% (?:\.\./)*nbs/(\S+)\.ipynb #(\S+)")
PAPERS = r"(?:CTM|EDM2|EDM|DPM-Solver\+\+|UniPC)"
PAPER = re.compile(rf"#\s*({PAPERS}(?::|, | Eq| Alg| Table| [Aa]ppendix)[^\"]*)")
PLACE = re.compile(r"(Eq|Alg|Table|appendix)\b", re.I)


@dataclass
class Parameter:
    name: str  # with its stars
    hint: str = ""  # annotation as written
    default: str = ""  # as written; empty: none
    text: str = ""  # the comment beside it


@dataclass
class Reference:
    paper: str  # "CTM" or "EDM"
    item: str  # "Eq. 5", "soft-matching loss"
    note: str = ""  # what follows the item


@dataclass
class Definition:
    name: str  # as called: "jump", "CTM.G"
    module: str  # "method.teacher"
    kind: str  # "function", "class", "method", "data"
    lines: tuple  # first and last, from 1
    doc: str = ""  # docstring without references
    parameters: list = field(default_factory=list)
    returns: tuple = ("", "")  # annotation, comment
    bases: list = field(default_factory=list)
    members: list = field(default_factory=list)
    value: str = ""  # of data
    cell: str = ""  # id of the notebook's cell
    notebook: str = ""  # its path in nbs without ending: "1_method/03_teacher"
    references: list = field(default_factory=list)
    home: str = ""  # module of the class that a method belongs to, where it is another one

    @property
    def full(self): return f"ctm_nb.{self.home or self.module}.{self.name}"


@dataclass
class Module:
    name: str  # "method.teacher"
    path: Path  # of the file
    code: str  # all of it
    doc: str  # what one has at the end
    notebook: str  # where it is exported from; empty for a module that no notebook makes
    exported: list  # __all__
    definitions: list  # in the order of the file, methods inside their classes
    imports: dict  # name: module of ours that it comes from


def comments(code):
    "{line: text} of the comments of a module."
    return {
        t.start[0]: t.string for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type == tokenize.COMMENT
    }


def references(text):
    "What a comment or docstring says it computes: `# EDM Eq. 2, Table 1; CTM: DSM loss when ...` is three references."
    found = []
    for line in text.splitlines():
        if not (m := PAPER.search(line)): continue
        for part in re.split(rf";\s*(?={PAPERS}\W)", m[1].strip()):
            paper, rest = re.match(rf"({PAPERS})[:,]?\s*(.*)", part).groups()
            items, notes = [], []
            for piece in re.split(r",\s*", rest.strip()):
                if not items or (PLACE.match(piece) and not notes): items.append(piece)
                else: notes.append(piece)
            if paper == "CTM":
                items[0], _, when = items[0].partition(" when ")
                if when: notes.insert(0, f"when {when}")
            found += [Reference(paper, item.strip(" ."), ", ".join(notes)) for item in items]
    return found


def without_references(doc):
    "A docstring as readers of the reference see it."
    return "\n".join(re.sub(r"\s*" + PAPER.pattern, "", line) for line in doc.splitlines()).strip()


def beside(line, notes, skip=()):
    "The comment at the end of a line, without its sign; nothing for a line of `skip`."
    return "" if line in skip else notes.get(line, "").lstrip("#").strip()


def parameters(node, notes, method):
    "Parameters of a function or method (whose first is left out), and what it returns."
    a, header = node.args, node.returns.end_lineno if node.returns else None
    defaults = [None] * (len(a.posonlyargs) + len(a.args) - len(a.defaults)) + a.defaults
    rows = [("", p, d) for p, d in zip([*a.posonlyargs, *a.args], defaults)][method:]
    rows += (
        [("*", a.vararg, None)] * bool(a.vararg)
        + [("", p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
        + [("**", a.kwarg, None)] * bool(a.kwarg)
    )
    last = {}  # line: the last parameter on it
    for _, p, d in rows: last[(d or p).end_lineno] = p
    skip = {header, node.lineno}
    found = [
        Parameter(
            stars + p.arg,
            ast.unparse(p.annotation) if p.annotation else "",
            ast.unparse(d) if d else "",
            beside((d or p).end_lineno, notes, skip) if last[(d or p).end_lineno] is p else "",
        )
        for stars, p, d in rows
    ]
    return found, (ast.unparse(node.returns), beside(header, notes)) if node.returns else ("", "")


def method_of(node):
    "Class that a `@patch`ed function extends, or None."
    if not any(getattr(d, "id", getattr(getattr(d, "func", None), "id", "")) == "patch" for d in node.decorator_list):
        return None
    return ast.unparse(node.args.args[0].annotation)


def function(node, module, notes, owner="", patched=False):
    "A Definition of a function."
    static = any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
    params, returns = parameters(node, notes, bool(owner) and not static)
    doc = ast.get_docstring(node) or ""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    inside = [r for line in range(first, node.end_lineno + 1) for r in references(notes.get(line, ""))]
    d = Definition(
        f"{owner}.{node.name}" if owner else node.name,
        module,
        "method" if owner else "function",
        (first, node.end_lineno),
        without_references(doc),
        params,
        returns,
    )
    d.references = references("\n".join(line if "#" in line else "" for line in doc.splitlines())) + inside
    return d


def klass(node, module, notes):
    "A Definition of a class: its public methods that say something, its fields or the parameters of `__init__`."
    d = Definition(
        node.name,
        module,
        "class",
        (min([node.lineno, *(k.lineno for k in node.decorator_list)]), node.end_lineno),
        without_references(ast.get_docstring(node) or ""),
        bases=[ast.unparse(b) for b in node.bases],
        references=references(ast.get_docstring(node) or ""),
    )
    for n in node.body:
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith("_"):
            d.parameters.append(
                Parameter(
                    n.target.id,
                    ast.unparse(n.annotation),
                    ast.unparse(n.value) if n.value else "",
                    beside(n.end_lineno, notes),
                )
            )
        if not isinstance(n, ast.FunctionDef): continue
        f = function(n, module, notes, node.name)
        if n.name == "__init__":
            d.parameters, d.references = f.parameters, d.references + f.references
        elif (not n.name.startswith("_") or n.name == "__call__") and (f.doc or any(p.text for p in f.parameters)):
            d.members.append(f)
        else: d.references += f.references
    return d


def data(node, module, code, notes):
    "Definitions of the names of an assignment."
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        for n in names:
            if isinstance(n, ast.Name) and not n.id.startswith("__"):
                yield Definition(
                    n.id,
                    module,
                    "data",
                    (node.lineno, node.end_lineno),
                    beside(node.end_lineno, notes),
                    value=ast.unparse(node.value),
                )


def dotted(path, folder):
    "Name of a module inside its package: `method/flow.py` is `method.flow`."
    return ".".join(Path(path).relative_to(folder).with_suffix("").parts)


def target(node, name):
    "Module of ours that a relative import in module `name` means."
    room = name.split(".")[:-node.level]
    return ".".join([*room, node.module or ""])


def read_module(path, folder):
    """A Module from its file in a package; definitions that `@patch` adds to another module's class keep the name
    `Class.method`."""
    code = Path(path).read_text(encoding="utf-8")
    tree, notes, name = ast.parse(code), comments(code), dotted(path, folder)
    exported = [
        ast.literal_eval(n.value)
        for n in tree.body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
    ]
    marks = [(i, m[1], m[2]) for i, line in enumerate(code.splitlines(), 1) if (m := CELL.match(line))]
    imports, found = {}, []
    for n in tree.body:
        if isinstance(n, ast.ImportFrom) and n.level and n.module:
            imports |= {a.asname or a.name: target(n, name) for a in n.names}
        if isinstance(n, ast.ClassDef): found.append(klass(n, name, notes))
        elif isinstance(n, ast.FunctionDef): found.append(function(n, name, notes, method_of(n) or ""))
        elif isinstance(n, (ast.Assign, ast.AnnAssign)) and getattr(n, "value", None):
            found += data(n, name, code, notes)
    for d in found:
        for line, book, cell in marks:
            if line <= d.lines[0]: d.notebook, d.cell = book, cell
        for m in d.members: m.notebook, m.cell = d.notebook, d.cell
    made = re.search(r"File to edit: (?:\.\./)*nbs/(\S+)\.ipynb", code)
    return Module(
        name,
        Path(path),
        code,
        ast.get_docstring(tree) or "",
        made[1] if made else "",
        exported[0] if exported else [],
        found,
        imports,
    )


def read_package(folder):
    "{name: Module} of a package; methods are moved to the class that they extend."
    files = [p for p in sorted(Path(folder).rglob("*.py")) if not p.stem.startswith("_")]
    modules = {dotted(p, folder): read_module(p, folder) for p in files}
    classes = {d.name: d for m in modules.values() for d in m.definitions if d.kind == "class"}
    for m in modules.values():
        for d in [d for d in m.definitions if d.kind == "method"]:
            m.definitions.remove(d)
            owner = next(
                (c for c in m.definitions if c.kind == "class" and c.name == d.name.partition(".")[0]),
                classes.get(d.name.partition(".")[0]),
            )
            if owner: d.home = owner.module
            if owner and not d.name.split(".")[-1].startswith("_"): owner.members.append(d)
            elif owner: owner.references += d.references
    return modules


def everything(modules):
    "All definitions, methods too."
    for m in modules.values():
        for d in m.definitions: yield from (d, *d.members)
