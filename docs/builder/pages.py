"""Pages that nobody writes: the reference from the code's comments, the tables of symbols and equations from notebooks
and code."""
import ast
import re
from collections import defaultdict

from .notebooks import display
from .source import everything

SPECIAL = re.compile(r"([\\*_$\[\]<>|{}#~])")
PAPERS = {
    "CTM": "Kim et al., *Consistency Trajectory Models*, [arXiv 2310.02279](https://arxiv.org/abs/2310.02279)",
    "EDM": "Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*, [arXiv "
           "2206.00364](https://arxiv.org/abs/2206.00364)",
    "EDM2": "Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models*, [arXiv "
            "2312.02696](https://arxiv.org/abs/2312.02696)",
    "DPM-Solver++": "Lu et al., *DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models*, "
                    "[arXiv 2211.01095](https://arxiv.org/abs/2211.01095)",
    "UniPC": "Zhao et al., *UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models*, "
             "[arXiv 2302.04867](https://arxiv.org/abs/2302.04867)",
}


def md(text):
    "Plain text as Markdown, code between backticks kept; safe in a table's cell."
    return "".join(
        p.replace("|", r"\|") if p.startswith("`") else SPECIAL.sub(r"\\\1", p) for p in re.split(r"(`[^`\n]+`)", text)
    )


def code(text):
    return (
        "`` " + text.replace("|", r"\|") + " ``"
        if "`" in text
        else f"`{text.replace('|', chr(92) + '|')}`"
        if text
        else ""
    )


def table(head, rows, kind=""):
    """A Markdown table; nothing without rows. `kind` is its class for the style sheet: rows of a `stacked` one become
    blocks on narrow screens."""
    rows, mark = list(rows), [f"```{{rst-class}} {kind}\n```\n"] if kind else []
    return (
        "\n".join(
            [
                *mark,
                "| " + " | ".join(head) + " |",
                "|" + "---|" * len(head),
                *("| " + " | ".join(r) + " |" for r in rows),
            ]
        )
        if rows
        else ""
    )


def slug(text): return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def label(d): return f"cell-{slug(d.notebook)}-{d.cell}"


def signature(d):
    "Names and defaults; types stand in the table. Long defaults are shortened to fit a line."
    parts = []
    for p in d.parameters:
        parts.append(f"{p.name}={p.default if len(p.default) <= 28 else '...'}" if p.default else p.name)
    return f"{d.name.split('.')[-1]}({', '.join(parts)})"


def where(d, host, branch, titles):
    "Links below a definition: the cell that derives it, its lines at the host, the equations that it computes."
    links = [f"{{ref}}`{titles[d.notebook]} <{label(d)}>`"] if d.notebook in titles and d.cell else []
    links.append(
        f"[{d.module}, "
        f"{lines(d)}]({host}/blob/{branch}/ctm_nb/{d.module.replace(chr(46), chr(47))}.py#L{d.lines[0]}-L{d.lines[1]})"
    )
    links += [f"{{ref}}`{r.paper}: {r.item} <{equation_label(r)}>`" for r in d.references]
    return "```{rst-class} where\n```\n" + " · ".join(links)


def lines(d): return f"line {d.lines[0]}" if d.lines[0] == d.lines[1] else f"lines {d.lines[0]}-{d.lines[1]}"


def definition(d, host, branch, titles, depth=5):
    "A definition as a directive: what it is for, parameters, result, members."
    body = [md(d.doc).replace("\n\n", "\n\n")] if d.doc else []
    types, defaults = any(p.hint for p in d.parameters), any(p.default for p in d.parameters)
    if d.kind == "data":
        shown = f"{d.name} = {shortened(d.value)}"
        body.append(f"```{'python' if is_python(shown) else 'text'}\n{shown}\n```")
    elif any(p.hint or p.text for p in d.parameters):
        columns = [
            ("parameter", lambda p: code(p.name)),
            *[("type", lambda p: code(p.hint))] * types,
            *[("default", lambda p: code(p.default))] * defaults,
            ("meaning", lambda p: md(p.text)),
        ]
        body.append(table([h for h, _ in columns], ([f(p) for _, f in columns] for p in d.parameters), "stacked"))
    if d.returns[0] not in ("", "None") or d.returns[1]:
        body.append("**Returns** " + code(d.returns[0]) + (f": {md(d.returns[1])}" if d.returns[1] else ""))
    body.append(where(d, host, branch, titles))
    body += [definition(m, host, branch, titles, depth - 1) for m in d.members]
    kind = dict(function="py:function", method="py:method", data="py:data")
    head = d.name.split(".")[-1] if d.kind == "data" else signature(d)
    bases = [f"Extends {', '.join(code(b) for b in d.bases)}."] if d.bases else []
    fence = ":" * (depth + 3)
    return f"{fence}{{{kind.get(d.kind, 'py:class')}}} {head}\n\n" + "\n\n".join(bases + body) + f"\n{fence}"


def is_python(text):
    "Can it be read as code? A value that was cut inside of a string can't."
    try: ast.parse(text)
    except SyntaxError: return False
    return True


def shortened(value, width=110, lines=6):
    "A value over a few short lines."
    import textwrap
    found = textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)
    return "\n    ".join(found[:lines] + ["..."] * (len(found) > lines))


def module_page(m, host, branch, titles):
    "The reference of a module: a line for each name, then each in full."
    shown = [d for d in m.definitions if d.name in m.exported or (not m.exported and not d.name.startswith("_"))]
    first = lambda d: md(d.doc.split("\n")[0]) if d.doc else ""
    notebook = f"\n\nMade by {{doc}}`{titles[m.notebook]} </notebooks/{m.notebook}>`." if m.notebook in titles else ""
    return "\n\n".join([
        f"# {m.name}", f"> {m.doc}{notebook}" if m.doc else notebook.strip(), f"```{{py:module}} ctm_nb.{m.name}\n```",
        table(["name", "what it is"], ([f"{{py:obj}}`{d.name} <{d.full}>`", first(d)] for d in shown)),
        *(definition(d, host, branch, titles) for d in shown)]) + "\n"


def reference_index(modules, parts):
    "The reference's first page: all modules by part."
    at = {m.notebook: m for m in modules.values()}
    listed, text = (
        [],
        [
            "# Reference",
            "Every exported name with its parameters, collected from the comments beside them in the code. The name "
            "of a parameter, its unit and its range stand "
            "in the same line of the source; nothing here was written twice.",
        ],
    )
    for part, names in parts.items():
        here = [at[n] for n in names if n in at]
        listed += here
        if here:
            text += [
                f"## {part}",
                table(
                    ["module", "what it gives", "names"],
                    ([f"{{doc}}`{m.name} <{m.name}>`", m.doc, str(len(m.exported))] for m in here),
                ),
            ]
    other = [m for m in modules.values() if m not in listed]
    if other:
        text += [
            "## Without a notebook",
            table(["module", "what it gives"], ([f"{{doc}}`{m.name} <{m.name}>`", m.doc] for m in other)),
        ]
    return (
        "\n\n".join(
            [*text, "```{toctree}\n:hidden:\n:maxdepth: 1\n\n" + "\n".join(m.name for m in [*listed, *other]) + "\n```"]
        )
        + "\n"
    )


def equation_label(r): return equation_label_of(r.paper, r.item)


def order(item):
    "Equations, algorithms and tables by number, the rest by name."
    m = re.match(r"(Eq|Alg|Table|[Aa]ppendix)\D*(\d*)", item)
    return (
        (
            ("Eq", "Alg", "Table", "appendix").index(m[1] if m[1][0] != "A" or m[1] == "Alg" else "appendix"),
            int(m[2] or 99),
            item,
        )
        if m
        else (9, 0, item.lower())
    )


def equation_rows(modules):
    "{(paper, item): [(definition, note)]} of everything that the code says it computes."
    rows = defaultdict(list)
    for d in everything(modules):
        for r in d.references:
            if (d, r.note) not in rows[r.paper, r.item]: rows[r.paper, r.item].append((d, r.note))
    return dict(sorted(rows.items(), key=lambda kv: (kv[0][0], order(kv[0][1]))))


def equations_page(modules, tagged, titles, names):
    "Paper's equation -> function, from the comments in the code; the mathematics from the notebooks' tagged equations."
    text = [
        "# From the papers to the code",
        "What a function computes is said in a comment beside it (`# CTM: ...`, `# EDM Alg. 1`); this table is made "
        "of those comments, and the "
        "formulas of the equations that the notebooks tag with the same words; what has no formula here is an "
        "algorithm, a table or a choice. The other direction stands at each function of the [reference](api/index.md).",
    ]
    rows = equation_rows(modules)
    name = lambda d: f"{{py:obj}}`{d.module}.{d.name} <{d.full}>`" if d.full in names else code(f"{d.module}.{d.name}")
    for paper in dict.fromkeys(p for p, _ in rows):
        mine = {item: unique(found) for (p, item), found in rows.items() if p == paper}
        text += [
            f"## {paper}",
            PAPERS[paper],
            table(
                ["in the paper", "function"],
                (
                    [
                        f"{{ref}}`{md(sentence(item))} <{equation_label_of(paper, item)}>`",
                        ", ".join(name(d) for d, _ in found),
                    ]
                    for item, found in mine.items()
                ),
            ),
        ]
        for item, found in mine.items():
            formula = next((f for (p, name_), f in tagged.items() if p == paper and same(name_, item)), "")
            text += [
                f"({equation_label_of(paper, item)})=\n### {md(sentence(item))}",
                display(formula) if formula else "",
                "\n".join(
                    f"- {name(d)}"
                    + (f" in {{ref}}`{titles[d.notebook]} <{label(d)}>`" if d.notebook in titles and d.cell else "")
                    + (f": {md(note)}" if note else "")
                    for d, note in found
                ),
            ]
    return "\n\n".join(t for t in text if t) + "\n"


def same(tag, item):
    """Does the tag of an equation mean this item? Those with numbers by number, those with names (the map) by how they
    begin (the map G)."""
    return tag == item or (item.startswith(tag) and not item.startswith(("Eq", "Alg", "Table", "appendix")))


def finder_of_equations(modules):
    "A function from a paper and an equation's name to its label on the page of equations, or None."
    rows = equation_rows(modules)
    return lambda paper, name: next(
        (equation_label_of(p, item) for p, item in rows if p == paper and same(name, item)), None
    )


def sentence(text): return text[0].upper() + text[1:]


def equation_label_of(paper, item): return "equation-" + slug(f"{paper} {item}")


def unique(found):
    "One row a function, its notes joined."
    rows = {}
    for d, note in found: rows.setdefault(d.full, (d, []))[1].append(note)
    return [(d, "; ".join(dict.fromkeys(n for n in notes if n))) for d, notes in rows.values()]


def symbols_page(by_notebook, titles):
    "All symbols of the notebooks' tables, those of several notebooks first."
    text = [
        "# Symbols",
        "Collected from the table at the head of each notebook. Sizes: B images in a batch, C channels, H x W pixels.",
    ]
    groups = defaultdict(list)
    for name, rows in by_notebook.items():
        for symbol, code_, meaning in rows:
            key = symbol if symbol not in ("", "-") else code_
            groups[key].append((name, symbol, code_, meaning))
    rows = []
    for _, found in sorted(groups.items(), key=lambda kv: sort_key(kv[0])):
        for name, symbol, code_, meaning in found:
            rows.append(
                [
                    symbol if symbol not in ("", "-") and name == found[0][0] else "",
                    cell(code_),
                    cell(meaning),
                    f"{{doc}}`{titles[name]} </notebooks/{name}>`",
                ]
            )
    return "\n\n".join([*text, table(["symbol", "in code", "meaning, shape", "notebook"], rows, "stacked")]) + "\n"


def sort_key(symbol):
    "Letters first, whatever their mark-up; names in code last."
    letters = re.sub(r"\\(?:hat|text|frac|nabla|lVert)|[^A-Za-z]", "", symbol)
    return (not symbol.startswith("$"), letters.lower(), symbol)


def cell(text): return re.sub(r"(?<!\\)\|", r"\|", text)


def shown_names(modules):
    "Full names that the reference documents."
    names = {}
    for m in modules.values():
        for d in m.definitions:
            if d.name not in m.exported: continue
            names[d.full] = d
            for k in d.members: names[k.full] = k
    return names


def finder(modules, names, notebook):
    """A function from a name in a notebook's prose to the full name that it means there: its own module's, one it
    imports, or the only one of that name."""
    own = next((m for m in modules.values() if m.notebook == notebook), None)
    short = defaultdict(list)
    for full, d in names.items(): short[d.name].append(full)
    def find(name):
        if own and f"ctm_nb.{own.name}.{name}" in names: return f"ctm_nb.{own.name}.{name}"
        if (
            own
            and name.partition(".")[0] in own.imports
            and (full := f"ctm_nb.{own.imports[name.partition('.')[0]]}.{name}") in names
        ):
            return full
        if (full := f"ctm_nb.{name.removeprefix('ctm_nb.')}") in names: return full
        found = [f for f in short.get(name, []) if len(name) > 2]
        return found[0] if len(found) == 1 else None
    return find
