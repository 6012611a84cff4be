"""`python -m recipes.report RUN …`: see `recipes.report.page`."""

import sys

from recipes.report.page import main

raise SystemExit(main(sys.argv[1:]))
