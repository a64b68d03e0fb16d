"""The U-Net of all families, its blocks, and its second time input."""
from .._moved import names_of

__getattr__ = names_of(__name__, "networks")
