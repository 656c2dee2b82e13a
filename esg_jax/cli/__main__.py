"""`python -m esg_jax.cli` is `esg`."""

import sys

from esg_jax.cli import main

sys.exit(main())
