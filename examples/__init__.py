"""What users write: passes of their own."""
