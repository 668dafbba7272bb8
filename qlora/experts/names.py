"""Names of the modules of mixtures of experts. Imports no torch."""

import re

SHARED = re.compile(r"\.shared_(?:expert|mlp)s?\.")
"""In the names of the experts that every token runs through."""
