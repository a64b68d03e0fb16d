"""Sphinx's configuration. Facts about the package come from settings.ini; what is built is prepared by build.py."""
import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
parser = ConfigParser(delimiters=["="])
parser.read(ROOT/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

project, author, copyright, version = cfg["title"], cfg["author"], cfg["copyright"], cfg["version"]
release, language = version, "en"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
templates_path, html_static_path = (
    [],
    [str(HERE / "_static")] + ([os.environ["CTM_DOCS_STATIC"]] if os.environ.get("CTM_DOCS_STATIC") else []),
)
exclude_patterns = ["downloads"]
smartquotes = False
pygments_style, pygments_dark_style = "tango", "github-dark"
nitpicky = False

# Notebooks are shown as they were committed: nothing runs while the site is built.
nb_execution_mode = "off"
nb_code_prompt_show, nb_code_prompt_hide = "{type}", "{type}"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {"widgets/embed.js": {}}
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

mathjax_path = "mathjax/tex-chtml-full.js"
mathjax_options = {"defer": "defer"}
mathjax3_config = {"chtml": {"scale": 0.94}}
viewcode_follow_imported_members = False
viewcode_line_numbers = False
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"{project} {version}"
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_favicon = str(HERE/"_static"/"logo.svg")
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = dict(
    light_logo="logo.svg",
    dark_logo="logo.svg",
    navigation_with_keys=True,
    top_of_page_buttons=[],
    light_css_variables={
        "color-brand-primary": "#0b5e6b",
        "color-brand-content": "#0b6b7a",
        "color-api-name": "#0b5e6b",
        "color-api-pre-name": "#0b5e6b",
    },
    dark_css_variables={
        "color-brand-primary": "#6fd0de",
        "color-brand-content": "#6fd0de",
        "color-api-name": "#6fd0de",
        "color-api-pre-name": "#6fd0de",
    },
    footer_icons=[dict(name="Source", url=cfg["git_url"], html="Source code", **{"class": ""})],
)
linkcheck_anchors = False
linkcheck_timeout = 20
# Files of this project were looked up in the working tree when the links to them were written.
linkcheck_ignore = [re.escape(cfg["git_url"]) + "/(blob|tree)/"]


def find_source(app, modname):
    "Code and definitions of a module, for the pages behind [source]: read, not imported."
    from builder.source import everything, read_module
    path = ROOT/(modname.replace(".", "/") + ".py")
    if not path.is_file(): return None
    m = read_module(path, ROOT/cfg["lib_path"])
    return m.code, {
        d.name: ("class" if d.kind == "class" else "def", *d.lines) for d in everything({m.name: m}) if d.kind != "data"
    }


def mark_long_cells(app, doctree, name):
    "Cells of tables whose text needs a column of some width are told apart from numbers and names, for narrow screens."
    from docutils import nodes
    for cell in doctree.findall(nodes.entry):
        if len(cell.astext()) > 36: cell["classes"].append("long")


def setup(app):
    app.connect("viewcode-find-source", find_source)
    app.connect("doctree-resolved", mark_long_cells)
