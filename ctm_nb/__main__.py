"""`python -m ctm_nb`: the commands by name. See nbs/12_commands.ipynb."""
from .commands import main

if __name__ == "__main__": main()
