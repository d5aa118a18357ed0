"""``python -m dexport`` is the ``dexport`` command."""

from dexport.cli import main

main(prog_name="dexport")
