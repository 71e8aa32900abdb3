"""Settings stand beside the work that they steer: what calibration offers is imported without torch."""

import os
import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys
for package in ("lowrank_kit.calibration", "lowrank_kit.cache"):
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
for module in ("depth", "factored", "linear", "narrow", "rotate", "units"):
    importlib.import_module(f"lowrank_kit.models.{module}")
print([name for name in ("torch", "transformers", "peft", "accelerate", "scipy", "safetensors") if name in sys.modules])
"""


def test_calibration_is_imported_without_torch():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
