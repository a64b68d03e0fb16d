"""Notebooks as pages: nbdev's processors, exported code kept and marked, captions and alternative texts, names and
files linked."""
import ast
import copy
import posixpath
import re
from pathlib import Path

from .source import PAPERS

# The sidebar: a part of the site, the chapters of nbs/ that stand in it, and what a reader finds there. First what is
# to be understood, then
# what is to be used. A notebook in another folder stops the build.
PARTS = {
    "Start": (
        ["0_start", "guides"],
        "The whole method on one page, then pictures, then your own; and guides for other programs and many GPUs.",
    ),
    "Method": (
        ["1_method"],
        "From the probability-flow ODE to a student that jumps along it: derivations that are the library's code.",
    ),
    "Networks": (["2_networks"], "One U-Net that is DDPM++, NCSN++, ADM and OpenAI's, EDM2's, and their second time."),
    "Explore and experiments": (["8_explore", "9_experiments"], "Sliders over the method, and what was measured."),
    "Data": (["3_data"], "Pictures in and out: any collection, recognised by content."),
    "Checkpoints": (["4_checkpoints"], "Averages, checkpoints that survive a crash, other people's files."),
    "Evaluation": (["5_evaluation"], "Scores with their provenance, many samples, likelihood."),
    "Training": (["6_training"], "Everything a run depends on, one step, the loop around it."),
    "Commands": (["7_commands"], "The five commands."),
}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(^```.*?^```[ \t]*$|^\$\$.*?\$\$)", re.M | re.S)
SPAN = re.compile(r"(?<![`\[{}])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]])")
TAG = re.compile(r"\\tag\{([^}]*)\}")
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
NO_PARAGRAPH = re.compile(r"#|\||[-*+] |\d+\. |>|```|\$\$|!\[|:::|<|\(.*\)=$")


def part_of(name):
    "The part of the site that a notebook `chapter/NN_name` belongs to."
    chapter = name.partition("/")[0]
    for part, (chapters, _) in PARTS.items():
        if chapter in chapters: return part
    known = ", ".join(sorted(c for chapters, _ in PARTS.values() for c in chapters))
    raise ValueError(f"{name}.ipynb belongs to no part of the site: expected a chapter of {known}")


def found(nbs):
    "Notebooks of all chapters by name, `chapter/NN_name`, in order."
    return [p.relative_to(nbs).with_suffix("").as_posix() for p in sorted(Path(nbs).glob("*/[!_.]*.ipynb"))]


def reading_order(names):
    "{part: names}: chapters in the order of PARTS, notebooks in that of their numbers."
    order = {
        part: [n for c in chapters for n in sorted(names) if n.startswith(c + "/")]
        for part, (chapters, _) in PARTS.items()
    }
    return {part: here for part, here in order.items() if here}


def promise(cells):
    "The line in a blockquote below a notebook's title: what one has at the end."
    text = next((c.source for c in cells if c.cell_type == "markdown"), "")
    quoted = re.search(r"^> *(.+(?:\n>.*)*)", text, re.M)
    return re.sub(r"\n> *", " ", quoted[1]) if quoted else ""


def processed(path):
    "A notebook after nbdev's processors; exported cells stay, with a tag, and hidden ones go."
    import nbformat  # takes seconds, as do the others
    from execnb.nbio import read_nb
    from nbdev.process import NBProcessor
    from nbdev.processors import clean_magics, filter_stream_, hide_line, populate_language, rm_header_dash, strip_ansi

    p = NBProcessor(
        path, procs=[populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash, tagged, clean_magics]
    )
    p.process()
    cells = [{k: v for k, v in c.items() if not k.endswith("_")} for c in p.nb.cells]
    nb = nbformat.from_dict({**{k: v for k, v in read_nb(path).items() if k not in ("cells", "path_")}, "cells": cells})
    return without_widgets(nb)


def without_widgets(nb):
    "A widget whose state the notebook does not hold can't be shown: what it offers instead (a picture, text) is."
    held = nb.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for c in nb.cells:
        for o in c.get("outputs", []):
            d, view = o.get("data", {}), "application/vnd.jupyter.widget-view+json"
            if view in d and d[view].get("model_id") not in held and len(d) > 1: del d[view]
    return nb


def tagged(cell):
    "Say in tags what the directives say; drop what is not for readers."
    d = cell.directives_
    if cell.cell_type != "code": return
    if d.keys() & {"hide", "default_exp"} or d.get("include:") == ["false"]:
        del cell["source"]
        return
    tags = (
        ["export"] * bool(d.keys() & {"export", "exporti", "exports"})
        + ["remove-input"] * (d.get("echo:") == ["false"])
        + ["not-run"] * (d.get("eval:") == ["false"])
    )
    cell["source"] = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    cell["metadata"] = {**cell.metadata, "tags": tags} if tags else dict(cell.metadata)
    if not cell["source"].strip():
        del cell["source"]
    elif only_imports(cell["source"]) and not cell.get("outputs"):
        cell["metadata"] = {
            **cell["metadata"],
            "tags": [*tags, "hide-input"],
            "mystnb": {"code_prompt_show": "Imports", "code_prompt_hide": "Imports"},
        }


def only_imports(code):
    "Is a cell nothing but imports? They are folded."
    try: body = ast.parse(code).body
    except SyntaxError: return False
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def is_picture(output): return any(k in output.get("data", {}) for k in PICTURES)


def paragraph(text):
    "The first paragraph of a Markdown cell and the rest; nothing where it begins with something else."
    first, _, rest = text.strip().partition("\n\n")
    return (
        ("", text)
        if not first or NO_PARAGRAPH.match(first) or re.search(r"^(\$\$|#)", first, re.M)
        else (first, rest.strip())
    )


def titles(source):
    "Literal titles that a cell gives its figure or axes."
    return re.findall(r"""(?:suptitle|title)(?:\(|=)\s*["']([^"'{}]{4,})["']""", source)


def plain(text):
    "Markdown as a person would read it aloud: no signs of mark-up, mathematics in words as far as that is possible."
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    words = {
        r"\sigma": "sigma",
        r"\gamma": "gamma",
        r"\rho": "rho",
        r"\tau": "tau",
        r"\epsilon": "epsilon",
        r"\lambda": "lambda",
        r"\to": "to",
        r"\infty": "infinity",
        r"\approx": "about",
        r"\pm": "plus or minus ",
        r"\ge": ">=",
        r"\le": "<=",
        r"\times": "x",
        r"\sqrt": "root of ",
        r"\,": " ",
        r"\theta": "theta",
        r"\varphi": "phi",
        r"\mu": "mu",
    }
    def spoken(m):
        s = re.sub(r"\\t?frac\s*{?(\w+)}?\s*{?(\w+)}?", r"\1/\2", m[1])
        for k in sorted(words, key=len, reverse=True): s = s.replace(k, words[k])
        return re.sub(r"\\[a-zA-Z]+|[{}\\]", "", s)
    text = re.sub(r"\$([^$]+)\$", spoken, text)
    return re.sub(r"\s+", " ", re.sub(r"(?<!\w)[*_]+|[*_]+(?!\w)|`", "", text)).strip()


def first_sentence(text, limit=240):
    "Up to the first full stop that ends a sentence, or a cut at a word."
    s = re.split(r"(?<=[.!?])\s+(?=[A-Z*\"'(])", text, maxsplit=1)[0]
    return s if len(s) <= limit else s[:limit].rsplit(" ", 1)[0] + " ..."


def captioned(cells):
    """Give every picture a caption and an alternative text, and return the cells and the faults.

    The caption is the paragraph after the picture, which moves into the figure. Where none follows at once it is a
    title that the code gives the figure, or the first sentence
    of the nearest paragraph: after the cells of code behind the picture, or before those that lead to it. The
    alternative text is the caption's first sentence without mark-up."""
    cells, faults = [part for c in copy.deepcopy(cells) for part in apart(c)], []
    for i, c in enumerate(cells):
        if not any(map(is_picture, c.get("outputs", []))): continue
        after = cells[i + 1] if i + 1 < len(cells) else None
        caption, rest = paragraph(after.source) if after is not None and after.cell_type == "markdown" else ("", "")
        named = titles(c.source)
        if caption: after.source = rest
        else: caption = named[0] if named else first_sentence(near(cells, i, 1) or near(cells, i, -1), 400)
        if not caption:
            faults.append(f"cell {c.get('id')}: a picture without a paragraph beside it and without a title")
        else:
            c.metadata["mystnb"] = {
                "figure": {"caption": re.sub(r"\s*\n\s*", " ", caption)},
                "image": {"alt": first_sentence(plain(caption))},
            }
    return [c for c in cells if c.source.strip() or c.cell_type == "code"], faults


def apart(cell):
    """A cell whose pictures stand among other outputs as several cells, because a caption belongs to a picture alone;
    what follows the last picture comes before it."""
    outputs = cell.get("outputs", [])
    pictures = [o for o in outputs if is_picture(o)]
    if not pictures or len(pictures) == len(outputs): return [cell]
    only = copy.deepcopy(cell)
    cell["outputs"], only["outputs"] = [o for o in outputs if not is_picture(o)], pictures
    only["id"], only["metadata"] = f"{cell.get('id')}-pictures"[:64], {**cell.metadata, "tags": ["remove-input"]}
    return [cell, only]


def near(cells, i, step):
    """The paragraph that the nearest Markdown cell begins (step 1) or ends with (-1), if only code without pictures
    lies between; else nothing."""
    while 0 <= (i := i + step) < len(cells):
        c = cells[i]
        if c.cell_type == "markdown":
            blocks = c.source.strip().split("\n\n")
            return paragraph(blocks[0 if step > 0 else -1])[0].rstrip(":")
        if step > 0 and any(map(is_picture, c.get("outputs", []))): break
    return ""


def symbols(cells):
    "(symbol, code, meaning) of the notebook's symbol table."
    for c in cells:
        if c.cell_type != "markdown" or not (
            m := re.search(r"^\| *symbol *\|.*\n\|[-| :]+\n((?:\|.*\n?)+)", c.source, re.M)
        ):
            continue
        for row in m[1].strip().splitlines():
            columns = [x.strip().replace(r"\|", "|") for x in re.split(r"(?<!\\)\|", row.strip()[1:-1])]
            yield tuple((columns + ["", ""])[:3])
        return


def equations(cells):
    "{(paper, item): mathematics} of the display equations whose tags name a paper."
    text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    found = {}
    for m in re.finditer(r"\$\$(.+?)\$\$", text, re.S):
        if t := TAG.search(m[1]): found |= dict.fromkeys(named(t[1]), m[1].replace(t[0], "").strip().rstrip(".,"))
    return found


def named(tag):
    "(paper, item) of everything that a tag names: `4, EDM Eq. 5`, `CTM: decomposition of G, definition of g`."
    m = re.fullmatch(rf"(?:\d+, )?({PAPERS})(?::|,)? (.+)", tag)
    return [(m[1], item) for item in m[2].split(", ")] if m else []


def pieces(math):
    "The formulas that stand side by side in one display, between `\\qquad` outside of braces and environments."
    out, depth, at = [], 0, 0
    if r"\left" in math.replace(r"\leftarrow", ""): return [math.strip()]
    for m in re.finditer(r"\\begin\b|\\end\b|\\[{}\\]|[{}]|\\qquad\b", math):
        depth += {r"\begin": 1, r"\end": -1, "{": 1, "}": -1}.get(m[0], 0)
        if m[0] == r"\qquad" and depth == 0: out, at = [*out, math[at:m.start()].strip()], m.end()
    return [p for p in [*out, math[at:].strip()] if p]


def display(math):
    "A display as Markdown: formulas side by side become a row that a narrow screen breaks."
    parts = pieces(math)
    blocks = "\n\n".join(f"$$ {p} $$" for p in parts)
    return f":::{{container}} side-by-side\n{blocks}\n:::" if len(parts) > 1 else blocks


def displays(text, place=lambda paper, item: None):
    """Display equations made fit for screens of any width: formulas side by side, and the tag beside the
    mathematics instead of in it, where it pushes the mathematics out of the page.
    `place` says the label that an equation's name leads to, or None."""
    def one(m):
        t = TAG.search(m[1])
        if not t: return display(m[1]) if len(pieces(m[1])) > 1 else m[0]
        to = next(filter(None, (place(*n) for n in named(t[1]))), None)
        return (
            f"::::{{container}} tagged\n{display(m[1].replace(t[0], ''))}\n\n"
            + (f"{{ref}}`({t[1]}) <{to}>`" if to else f"({t[1]})")
            + "\n::::"
        )
    blocks = re.split(r"(^```.*?^```[ \t]*$)", text, flags=re.M | re.S)
    return "".join(
        b if b.startswith("```") else re.sub(r"^\$\$(.+?)\$\$[ \t]*$", one, b, flags=re.M | re.S) for b in blocks
    )


def title_of(cells):
    "Text of the H1."
    for c in cells:
        if c.cell_type == "markdown" and (m := re.search(r"^# +(.+)$", c.source, re.M)): return m[1].strip()
    return ""


def outside_code(change, text):
    "Apply `change` to what is neither a fenced block nor display mathematics."
    return "".join(part if part.startswith(("```", "$$")) else change(part) for part in FENCE.split(text))


def linked_names(text, find):
    """The first mention of each name of ours in a text as a link to the reference; `find` says its full name, or None.
    Headings and tables' heads stay as they are."""
    seen = set()
    def link(m):
        full = find(m[1])
        if not full or full in seen: return m[0]
        seen.add(full)
        return f"{{py:obj}}`{m[1]} <{full}>`"
    change = lambda s: "\n".join(line if line.startswith("#") else SPAN.sub(link, line) for line in s.split("\n"))
    return outside_code(change, text)


class Files:
    """What notebooks link to: pages stay pages, pictures are copied, other files of the project become addresses at
    its host."""
    def __init__(self, root, pages, host, branch):
        self.root, self.pages, self.host, self.branch, self.pictures = Path(root), set(pages), host, branch, set()

    def link(self, target, folder="nbs", to=""):
        """`target` as written in a notebook of `folder`, as seen from a page; `to` leads from there to the pages of
        notebooks."""
        if re.match(r"[a-z][a-z0-9+.-]*:|[/#]", target, re.I): return target
        path, _, anchor = target.partition("#")
        where = posixpath.normpath(posixpath.join(folder, path))
        seen = lambda name: to + name if to else posixpath.relpath(name, folder.partition("/")[2] or ".")
        if where.startswith("nbs/") and (name := where[4:]).endswith(".ipynb") and name[:-6] in self.pages:
            return seen(name) + ("#" + anchor if anchor else "")
        if not (self.root/where).exists(): raise ValueError(f"a link to {target}: there is no {where}")
        if re.search(r"\.(png|jpe?g|gif|svg|webp)$", where) and where.startswith("nbs/"):
            self.pictures.add(where[4:])
            return seen(where[4:])
        return f"{self.host}/{'tree' if (self.root / where).is_dir() else 'blob'}/{self.branch}/{where}" + (
            "#" + anchor if anchor else ""
        )

    def relink(self, text, folder="nbs", to=""):
        "All links of a Markdown text."
        change = lambda s: LINK.sub(lambda m: m[1] + self.link(m[2], folder, to) + m[3], s)
        return outside_code(change, text)
