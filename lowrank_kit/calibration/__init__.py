"""Statistics of a model's activations: what is fed, how it streams, where the results are kept."""
