"""`python -m keras_blocksparse` is the command `kbs`."""

import sys

from keras_blocksparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
