"""`python -m ctm_nb`: the commands by name. See nbs/7_commands/06_main.ipynb."""
from .commands.main import main

if __name__ == "__main__": main()
