"""`python -m safelocus`: the command line."""

from safelocus.cli import main

main()
