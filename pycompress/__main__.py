"""``python -m pycompress`` is the doctor; with arguments it is the ``pycompress`` command."""

import sys

from .cli import main

main(sys.argv[1:] or ["doctor"])
