"""How a matrix is cut to a rank: each truncation is a metric, and the best approximation in it. One file each."""

from lowrank_kit.discovery import import_all

import_all(__name__, __path__)
