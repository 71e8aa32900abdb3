"""How a low-rank matrix lies in the model: one file each. It says what a rank costs, and allocations ask it."""

from lowrank_kit.discovery import import_all

import_all(__name__, __path__)
