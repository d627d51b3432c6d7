"""`python -m fedlm` is `fedlm`."""

from fedlm.cli.main import main

main()
