"""Where the contents of 0.1's flat modules are: three of them and the names of five rooms go on working for one
release, the others say where to look."""
import importlib
import importlib.abc
import importlib.util
import sys
import warnings

# old module -> new module, both inside ctm_nb
MOVED = {
    "blocks": "networks.blocks", "networks": "networks.unet",
    "flow": "method.flow", "edm": "method.teacher", "trajectory": "method.trajectory", "together": "method.balance",
    "distances": "method.distances", "distill": "method.distill", "features": "method.adversary",
    "gan": "method.adversary", "sampling": "method.sampling", "guidance": "method.guidance",
    "decode": "data.read", "zips": "data.read", "sources": "data.read", "formats": "data.read",
    "survey": "data.convert", "convert": "data.convert", "data": "data.images", "augment": "data.augment",
    "loader": "data.batches", "pictures": "data.images",
    "state": "checkpoints.store", "depickle": "checkpoints.unpickle", "edm_pickle": "checkpoints.unpickle",
    "foreign": "checkpoints.foreign", "download": "checkpoints.catalogue", "hub": "checkpoints.catalogue",
    "interchange": "checkpoints.models",
    "metrics": "evaluation.metrics", "similarity": "evaluation.metrics", "extractors": "evaluation.features",
    "references": "evaluation.reference", "evaluation": "evaluation.evaluate", "classifier": "evaluation.draw",
    "containers": "evaluation.draw", "search": "evaluation.search", "tuning": "evaluation.search",
    "draw": "evaluation.draw", "shares": "evaluation.reference", "ways": "evaluation.evaluate",
    "sides": "evaluation.evaluate", "likelihood": "evaluation.likelihood", "scoring": "evaluation.evaluate",
    "auto": "training.presets", "config": "training.config", "precision": "training.runtime",
    "processes": "training.runtime", "signals": "training.runtime", "guards": "training.runtime",
    "resume": "training.trainer", "judge": "training.trainer", "stages": "training.stages",
    "update": "training.step", "engine": "training.trainer", "training": "training.trainer",
    "history": "training.report", "report": "training.report", "watch": "training.report",
    "scale": "training.costs",
    "cli": "commands.train", "cli_sample": "commands.sample", "cli_evaluate": "commands.evaluate",
    "cli_data": "commands.data", "cli_convert": "commands.convert", "commands": "commands.main",
    "scenes": "explore.explorer", "explorer": "explore.explorer",
}
WORKING = ("interchange", "sampling", "metrics")
GONE = {"oracle": "benchmarks/oracle.py"}  # old module -> where its code went, outside the package


def new_place(
    name: str,  # of a module of 0.1, without the package
) -> str:  # full name of the module that holds its contents
    "Where a module of 0.1 went."
    return f"ctm_nb.{MOVED[name]}"


def warn(old: str, new: str, depth: int):
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
        raise ModuleNotFoundError(f"{fullname} is now {new_place(name)}", name=fullname)

    def create_module(self, spec):
        "An empty module, which the successor replaces."
        warn(spec.name, new_place(spec.name.partition(".")[2]), 4)

    def exec_module(self, module):
        "Put the successor itself in its place, so that what is patched in one is patched in the other."
        sys.modules[module.__name__] = importlib.import_module(new_place(module.__name__.partition(".")[2]))


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
            new = importlib.import_module(new_place(old))
            if hasattr(new, name):
                warn(f"{room}.{name}", f"{new.__name__}.{name}", 3)
                return getattr(new, name)
        raise AttributeError(f"module {room!r} has no attribute {name!r}")
    return __getattr__


def install():
    "Look up old modules after everything else has failed to find them."
    if not any(isinstance(f, Finder) for f in sys.meta_path): sys.meta_path.append(Finder())
