"""The mathematics of rounding weights."""
