"""`python -m benchmarks`: `fastmeta bench`, from a checkout."""

import sys

from fastmeta.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
