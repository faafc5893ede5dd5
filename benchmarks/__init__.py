"""Speed against rivals, and quality at equal budget; ``python -m benchmarks --help``.

A package with this file, because Opacus and kronfluence install a ``benchmarks`` of their own: one without would lose.
"""
