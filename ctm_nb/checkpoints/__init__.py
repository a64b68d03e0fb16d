"""Averages, checkpoints that survive a crash, other people's files, public files by name."""
from .._moved import names_of

__getattr__ = names_of(__name__, load="models")
