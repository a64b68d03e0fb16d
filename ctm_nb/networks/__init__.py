"""The U-Nets of all families, their blocks, and their second time input."""
from .._moved import names_of

_HERE = dict.fromkeys(("FAMILIES", "build_network", "network_config"), "families")
__getattr__ = names_of(__name__, "networks", **_HERE)
