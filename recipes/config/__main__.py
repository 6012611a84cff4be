"""`python -m recipes.config`: see `recipes.config.load`."""

import sys

from recipes.config.load import main

raise SystemExit(main(sys.argv[1:]))
