"""The method, and nothing else: flow, solvers, teacher, trajectory, losses, adversary, sampling."""
from .._moved import names_of

__getattr__ = names_of(__name__, sample="sampling")
