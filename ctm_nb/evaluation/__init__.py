"""Scores with their provenance, many samples, feature networks, the search of times."""
from .._moved import names_of

__getattr__ = names_of(__name__, "evaluation")
