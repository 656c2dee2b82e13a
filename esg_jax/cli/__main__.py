"""`python -m esg_jax.cli` is `esg`."""

import sys

from esg_jax import cli
from esg_jax.allocator import keep_memory


def main() -> int:
    """The program; from Python call `esg_jax.cli.main`."""
    keep_memory()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
