"""``python -m secateur`` is ``secateur``."""

import sys

from secateur.cli.main import main

sys.exit(main())
