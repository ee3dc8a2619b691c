"""Rewrites that targets share."""
