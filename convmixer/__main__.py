"""`python -m convmixer`, the same as the command."""

from convmixer.cli import main

main(prog_name="convmixer")
