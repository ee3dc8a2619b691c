"""How a scale moves through a graph."""
