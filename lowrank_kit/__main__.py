"""`python -m lowrank_kit VERB ...`."""

import sys

from lowrank_kit.commands import main

sys.exit(main())
