"""Who gets which rank: one file of mathematics a rule, any of them with any truncation.

A rule reads `Candidate`s (shapes and spectra), never weights, and meets a `Budget` of parameters exactly.
"""

from lowrank_kit.discovery import import_all

import_all(__name__, __path__)
