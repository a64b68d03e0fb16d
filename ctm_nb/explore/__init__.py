"""Sliders over the functions of the method."""
from .._moved import names_of

__getattr__ = names_of(__name__)
