"""Where the contents of 0.1's flat modules are: three of them and the names of five rooms go on working for one
release, the others say where to look."""
import importlib
import importlib.abc
import importlib.util
import sys
import warnings

# new room -> its files' former modules, former:file, or one word where the name has stayed
_FORMER = {
    "networks": "blocks networks:unet",
    "method": "flow edm:teacher trajectory together:balance distances distill features:adversary gan:adversary "
        "sampling guidance",
    "data": "decode:read zips:read sources:read formats:read survey:convert convert data:images augment "
        "loader:batches pictures:images depickle:pickles",
    "checkpoints": "state:store edm_pickle:unpickle foreign download:catalogue hub:catalogue "
        "interchange:models",
    "evaluation": "metrics similarity:metrics extractors:features references:reference evaluation:evaluate "
        "classifier:draw containers:draw search tuning:search draw shares:reference ways:evaluate "
        "sides:evaluate likelihood scoring:evaluate",
    "training": "auto:presets config precision:runtime processes:runtime signals:runtime guards:runtime "
        "resume:trainer judge:trainer stages update:step engine:trainer training:trainer history:report "
        "report watch:report scale:costs",
    "commands": "cli:train cli_sample:sample cli_evaluate:evaluate cli_data:data cli_convert:convert commands:main",
    "explore": "scenes:explorer explorer",
}
# old module -> new module, both inside ctm_nb
MOVED = {old: f"{room}.{new or old}" for room, row in _FORMER.items()
         for old, _, new in (word.partition(":") for word in row.split())}
WORKING = ("interchange", "sampling", "metrics")
GONE = {"oracle": "benchmarks/oracle.py"}  # old module -> where its code went, outside the package


def _warn(old, new, depth):
    "Tell a caller's line that its import works for one more release."
    warnings.warn(f"{old} is now {new}; the old name goes with ctm_nb 0.3", DeprecationWarning, stacklevel=depth)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Finds the modules of 0.1 that are no more: as their successors, or as an ImportError that names them."
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        if package == "ctm_nb" and name in GONE:
            raise ModuleNotFoundError(f"{fullname} is no part of the package any more, see {GONE[name]}", name=fullname)
        if package != "ctm_nb" or name not in MOVED: return None
        if name in WORKING: return importlib.util.spec_from_loader(fullname, self)
        raise ModuleNotFoundError(f"{fullname} is now ctm_nb.{MOVED[name]}", name=fullname)

    def create_module(self, spec):
        "An empty module, which the successor replaces."
        _warn(spec.name, f"ctm_nb.{MOVED[spec.name.partition('.')[2]]}", 4)

    def exec_module(self, module):
        "Put the successor itself in its place, so that what is patched in one is patched in the other."
        sys.modules[module.__name__] = importlib.import_module(f"ctm_nb.{MOVED[module.__name__.partition('.')[2]]}")


def names_of(
    room: str,  # full name of a sub-package
    old: str | None = None,  # module of 0.1 that bore the room's name
    **ours: str,  # name -> module of the room that it is offered from
):  # a module's `__getattr__` (PEP 562)
    "Names that a room offers itself, and for one release those of the old module of the same name."
    def __getattr__(name: str):
        if name in ours: return getattr(importlib.import_module(f"{room}.{ours[name]}"), name)
        is_module = importlib.util.find_spec(f"{room}.{name}") is not None
        if old and not name.startswith("_") and not is_module:
            new = importlib.import_module(f"ctm_nb.{MOVED[old]}")
            if hasattr(new, name):
                _warn(f"{room}.{name}", f"{new.__name__}.{name}", 3)
                return getattr(new, name)
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    return __getattr__


def install():
    "Look up old modules after everything else has failed to find them."
    if not any(isinstance(f, Finder) for f in sys.meta_path): sys.meta_path.append(Finder())
