"""``python -m diffedit``."""

from __future__ import annotations

import sys

from diffedit.cli import main

if __name__ == "__main__":
    sys.exit(main())
