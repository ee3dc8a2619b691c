"""A graph as text."""
