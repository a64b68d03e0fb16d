"""Make README.md from nbs/index.ipynb:  python .ci/readme.py [notebook] [readme]

Cells marked `#| hide` go, other directive lines are stripped (`#| echo: false` keeps the output alone), links and
pictures that are
relative to the notebook become relative to the readme, and pictures among the outputs are written beside the
notebook's others. The
same notebook gives the same bytes.
"""
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|[ \t]*(.*?)[ \t]*$\n?", re.M)
LINK = re.compile(r"""(\]\(|\b(?:src|href)=["'])(?![a-z][a-z0-9+.-]*:|[/#])([^)"'\s]+)""", re.I)
FENCE = re.compile(r"(^```.*?^```[ \t]*$)", re.M | re.S)


def prepare(cell):
    "The cell without its directives, or None if it is not for readers."
    marks = DIRECTIVE.findall(cell.source) if cell.cell_type == "code" else []
    if any(re.match(r"(hide|default_exp|include:\s*false)\b", m) for m in marks): return None
    cell.source = DIRECTIVE.sub("", cell.source).strip("\n") if marks else cell.source
    cell.metadata = nbformat.NotebookNode(
        tags=["no-input"] if any(re.match(r"echo:\s*false\b", m) for m in marks) else []
    )
    return cell if cell.source.strip() else None


def render(notebook, folder="nbs"):
    """Markdown text and {path: bytes} of the pictures among the outputs; `folder` is the notebook's as seen from the
    readme."""
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata["language_info"] = dict(name="python")
    nb.cells = [c for c in map(prepare, nb.cells) if c is not None]
    config = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={"no-input"}))
    resources = dict(output_files_dir="images", unique_key=Path(notebook).stem)
    text, resources = MarkdownExporter(config=config).from_notebook_node(nb, resources)
    move = lambda m: m[1] + posixpath.normpath(posixpath.join(folder, m[2]))
    text = "".join(part if part.startswith("```") else LINK.sub(move, part) for part in FENCE.split(text))
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    pictures = {posixpath.join(folder, name): data for name, data in resources.get("outputs", {}).items()}
    return f"<!-- Made from {folder}/{Path(notebook).name} by `make readme`; edit the notebook. -->\n\n{text}", pictures


if __name__ == "__main__":
    notebook, readme = (sys.argv[1:] + ["nbs/index.ipynb", "README.md"][len(sys.argv) - 1:])[:2]
    text, pictures = render(notebook)
    for name, data in {readme: text.encode(), **{Path(readme).parent/n: d for n, d in pictures.items()}}.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)
