"""What is kept on disk for other runs: statistics of calibration, and figures of models as they came."""
