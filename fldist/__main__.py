"""`python -m fldist`, which is also how torchrun and mpirun start a rank."""

from fldist.cli import main

main()
