"""The five commands."""
from .._moved import names_of

__getattr__ = names_of(__name__, "commands")
