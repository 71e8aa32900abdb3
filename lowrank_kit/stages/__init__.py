"""The stages of a run, by kind of task: `calibrate`, `plan`, `apply`, `train`, `evaluate`."""
