"""What a block may lose instead of rank: one file each."""

from lowrank_kit.discovery import import_all

import_all(__name__, __path__)
