"""`python -m timm_ela` is the command line, and `torchrun -m timm_ela run SCRIPT` runs a script on several GPUs."""
from .cli import main

main()
