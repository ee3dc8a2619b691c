"""Data through a model: piece by piece, into statistics, with what interrupted runs have left."""
