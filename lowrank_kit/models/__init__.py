"""The only place that knows architectures: how models are loaded and where their linears are."""
