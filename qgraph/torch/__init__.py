"""To and from torch."""
