"""How a truncated matrix makes up for the errors before it: one file each."""

from lowrank_kit.discovery import import_all

import_all(__name__, __path__)
