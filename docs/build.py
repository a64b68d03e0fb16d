"""Build the documentation site:  python docs/build.py [--out _docs] [--work _proc/site] [NOTEBOOK ...]

Notebooks and modules become Sphinx's source in the working folder, Sphinx makes pages of it (warnings are errors),
and the pages are checked. Nothing is executed, and neither
torch nor ctm_nb is needed. Names of notebooks (1_method/04_trajectory) build a site of these alone.
"""
import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat

from builder import check, notebooks, pages, source, vendor

HERE = Path(__file__).resolve().parent
REFERENCE = """# Reference

> Every exported name, every equation and symbol, the words, and how to take part.

- {doc}`Modules </api/index>`: parameters with their shapes, from the comments beside them
- {doc}`From the papers to the code </equations>`, {doc}`symbols </symbols>`, {doc}`glossary </glossary>`
- {doc}`Contributing </contributing>`, {doc}`changes </changelog>`

"""
ROOT = HERE.parent


def settings(root=ROOT):
    "The section of settings.ini."
    from configparser import ConfigParser
    parser = ConfigParser(delimiters=["="])
    parser.read(root/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def head(name, module, cells):
    "What stands between the promise and the text of a page made from a notebook."
    made = f"Reference: {{doc}}`{module.name} </api/{module.name}>` · " if module else ""
    return nbformat.v4.new_markdown_cell(
        f"```{{rst-class}} where\n```\n{made}Notebook: {{download}}`{name}.ipynb </downloads/{name}.ipynb>`", id="head"
    )


def page(name, cells, files, find, folder="nbs", to="", place=lambda paper, item: None):
    """Cells of a page: links, names, tags of equations, captions; a mark before each exported cell that the reference
    leads to."""
    for c in cells:
        if c.cell_type == "markdown":
            c.source = notebooks.displays(pages_links(c.source, files, find, folder, to), place)
    cells, faults = notebooks.captioned(cells)
    out = []
    for c in cells:
        if "export" in c.metadata.get("tags", []):
            out.append(nbformat.v4.new_markdown_cell(f"(cell-{pages.slug(name)}-{c.id})=", id=f"mark-{c.id}"))
        out.append(c)
    return out, [f"{name}.ipynb, {f}" for f in faults]


def pages_links(text, files, find, folder, to): return notebooks.linked_names(files.relink(text, folder, to), find)


def folder_of(name): return "nbs/" + name.partition("/")[0]


def after_promise(cells, new):
    "Put a cell behind the first Markdown cell's H1 and blockquote, splitting it if more follows."
    for i, c in enumerate(cells):
        if c.cell_type != "markdown": continue
        paragraphs = c.source.split("\n\n")
        k = next((j for j in range(min(2, len(paragraphs))) if paragraphs[j].lstrip().startswith(">")), 0) + 1
        rest = "\n\n".join(paragraphs[k:])
        c.source = "\n\n".join(paragraphs[:k])
        return (
            cells[: i + 1]
            + [new]
            + ([nbformat.v4.new_markdown_cell(rest, id="rest")] if rest.strip() else [])
            + cells[i + 1 :]
        )
    return [new, *cells]


def save(cells, metadata, path):
    "Write a notebook that myst-nb knows the language of."
    path.parent.mkdir(parents=True, exist_ok=True)
    keep = {k: v for k, v in metadata.items() if k in ("kernelspec", "widgets")}
    nb = nbformat.v4.new_notebook(
        cells=cells, metadata={**keep, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    )
    nbformat.write(nb, path)


def toctree(entries): return "```{toctree}\n:hidden:\n:maxdepth: 1\n\n" + "\n".join(entries) + "\n```"


def part_page(part, names, titles, promises):
    "A page that opens a part of the site: what is in it, a line for each notebook."
    lines = [f"- {{doc}}`{titles[n]} </notebooks/{n}>`: {promises[n]}" for n in names]
    return (
        "\n\n".join(
            [
                f"# {part}",
                f"> {notebooks.PARTS[part][1]}",
                "\n".join(lines),
                toctree([f"/notebooks/{n}" for n in names]),
            ]
        )
        + "\n"
    )


DRAW = """```{raw} html
<p><a class="draw" href="_static/draw.html">Draw a picture now</a>: a student of this package, in your browser, on your
machine (10 MB).</p>
```"""


def prepare(work, only=(), root=ROOT, draw=False):
    "Write Sphinx's source; returns the faults. The front page leads to a page that draws, if there is one."
    cfg, nbs = settings(root), root/"nbs"
    host, branch = cfg["git_url"], cfg["branch"]
    names = [n for n in notebooks.found(nbs) if not only or n in only]
    modules = source.read_package(root/cfg["lib_path"])
    if only: modules = {k: m for k, m in modules.items() if m.notebook in names}
    parts = notebooks.reading_order(names)
    books = {n: notebooks.processed(nbs/f"{n}.ipynb") for n in names}
    titles = {n: notebooks.title_of(b.cells) or n for n, b in books.items()}
    tagged = {t: f for b in books.values() for t, f in notebooks.equations(b.cells).items()}
    files = notebooks.Files(root, names, host, branch)
    known, place = pages.shown_names(modules), pages.finder_of_equations(modules)
    symbols = {
        n: [
            tuple(files.relink(text, folder_of(n), to="notebooks/") for text in row)
            for row in notebooks.symbols(books[n].cells)
        ]
        for part in parts.values()
        for n in part
    }
    faults = []
    shutil.rmtree(work, ignore_errors=True)
    for n, b in books.items():
        own = next((m for m in modules.values() if m.notebook == n), None)
        cells, found = page(n, b.cells, files, pages.finder(modules, known, n), folder_of(n), place=place)
        faults += found
        save(after_promise(cells, head(n, own, cells)), b.metadata, work/"notebooks"/f"{n}.ipynb")
        (work/"downloads"/n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(nbs/f"{n}.ipynb", work/"downloads"/f"{n}.ipynb")
    write(work, "api/index.md", pages.reference_index(modules, parts))
    for m in modules.values(): write(work, f"api/{m.name}.md", pages.module_page(m, host, branch, titles))
    write(work, "equations.md", pages.equations_page(modules, tagged, titles, known))
    write(work, "symbols.md", pages.symbols_page(symbols, titles))
    missing = lambda m: m[0] if m[2] in names else m[1]
    for p in sorted((HERE / "pages").glob("*.md")):
        write(work, p.name, re.sub(r"\{doc\}`([^<`]*?) </notebooks/([\w/]+)>`", missing, p.read_text(encoding="utf-8")))
    project = [n for n in ("CONTRIBUTING", "CHANGELOG") if (root/f"{n}.md").exists()]
    for n in project:
        write(
            work,
            f"{n.lower()}.md",
            files.relink((root / f"{n}.md").read_text(encoding="utf-8"), folder=".", to="notebooks/"),
        )
    promises = {n: files.relink(notebooks.promise(b.cells), folder_of(n), to="/notebooks/") for n, b in books.items()}
    for part, here in parts.items():
        write(work, f"parts/{pages.slug(part)}.md", part_page(part, here, titles, promises))
    others = [
        "equations",
        "symbols",
        *(p.stem for p in sorted((HERE / "pages").glob("*.md"))),
        *(n.lower() for n in project),
    ]
    write(work, "reference.md", REFERENCE + toctree(["api/index", *others]) + "\n")
    front = notebooks.processed(nbs/"index.ipynb")
    cells, found = page("index", front.cells, files, lambda name: None, to="notebooks/")
    if draw: cells = after_promise(cells, nbformat.v4.new_markdown_cell(DRAW, id="draw"))
    tree = toctree([*(f"parts/{pages.slug(part)}" for part in parts), "reference"])
    save([*cells, nbformat.v4.new_markdown_cell(tree, id="trees")], front.metadata, work/"index.ipynb")
    for p in files.pictures:
        (to := work / "notebooks" / p).parent.mkdir(parents=True, exist_ok=True), shutil.copy(nbs / p, to)
    return faults + found


def write(work, name, text):
    (to := work/name).parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text, encoding="utf-8")


def sphinx(work, out, static, builder="html"):
    "Run Sphinx; warnings are errors, and all of them are shown."
    from sphinx.cmd.build import build_main
    os.environ["CTM_DOCS_STATIC"] = str(static)
    return build_main(
        [
            "-b",
            builder,
            "-q",
            "-W",
            "--keep-going",
            "-j",
            "auto",
            "-c",
            str(HERE),
            "-d",
            str(work.parent / "doctrees"),
            str(work),
            str(out),
        ]
    )


def main(argv=None):
    p = argparse.ArgumentParser(description="Build the documentation site.")
    p.add_argument("notebooks", nargs="*", help="names of the notebooks of a partial site (default: all)")
    p.add_argument("--out", type=Path, default=ROOT/settings()["doc_path"], help="the finished site")
    p.add_argument("--work", type=Path, default=ROOT/"_proc"/"site", help="folder for Sphinx's source; replaced")
    p.add_argument("--cache", type=Path, default=ROOT/"_proc"/"vendor", help="where archives from npm are kept")
    p.add_argument("--draw", type=Path, default=ROOT/"build"/"page"/"index.html",
                   help="a page that ctm_nb_convert --web has made; without one the site has none")
    p.add_argument(
        "--linkcheck",
        action="store_true",
        help="ask the internet whether links to elsewhere work, instead of building pages",
    )
    a = p.parse_args(argv)
    faults = prepare(a.work, a.notebooks, draw=a.draw.exists())
    if faults: sys.exit("\n".join(faults))
    static = a.work.parent/"static"
    try: vendor.vendor(static, a.cache)
    except vendor.NotFetched as e: sys.exit(f"docs: {e}")
    if a.draw.exists(): shutil.copy(a.draw, static/"draw.html")
    if a.linkcheck: sys.exit(sphinx(a.work, a.work.parent/"linkcheck", static, "linkcheck"))
    made = a.work.parent/"html"  # not at its place yet: a failed build leaves the old site, and myst-nb writes beside
    shutil.rmtree(made, ignore_errors=True)
    if code := sphinx(a.work, made, static): sys.exit(code)
    shutil.rmtree(a.out, ignore_errors=True)
    shutil.move(made, a.out)
    (a.out/".nojekyll").touch()
    faults, elsewhere = check.check(a.out)
    (a.out / "external_links.txt").write_text(
        "".join(f"{url}  {', '.join(sorted(set(where)))}\n" for url, where in sorted(elsewhere.items())),
        encoding="utf-8",
    )
    if faults: sys.exit("\n".join(faults) + f"\n{len(faults)} faults")
    sys.stdout.write(
        f"{a.out}/index.html: {len(list(a.out.rglob('*.html')))} pages; every internal link and picture is there; "
        f"{len(elsewhere)} links to elsewhere are listed in external_links.txt\n"
    )


if __name__ == "__main__": main()
