"""Real models, data and metrics that the tests and the benchmark scripts share."""
