"""``python -m fishkern``: the same as the ``fishkern`` command."""

from fishkern.cli import main

main()
