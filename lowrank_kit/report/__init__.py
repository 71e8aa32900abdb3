"""Any set of run directories as one table: `python -m lowrank_kit.report RUNS`."""
