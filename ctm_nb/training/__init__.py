"""One run: configuration, stages, step, trainer, report."""
from .._moved import names_of

__getattr__ = names_of(__name__, "training")
