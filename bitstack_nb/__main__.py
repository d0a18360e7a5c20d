"""``python -m bitstack_nb``: the command line."""

import sys

from bitstack_nb.cli import main

if __name__ == "__main__":
    sys.exit(main())
