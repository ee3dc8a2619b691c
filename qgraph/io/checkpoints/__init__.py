"""Quantized checkpoints that others made."""
