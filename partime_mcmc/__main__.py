"""`python -m partime_mcmc`."""

import sys

from partime_mcmc.cli import main

if __name__ == "__main__":
    sys.exit(main())
