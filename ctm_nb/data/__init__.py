"""Pictures in and out."""
from .._moved import names_of

__getattr__ = names_of(__name__, "data", load_data="batches")
