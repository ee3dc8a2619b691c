"""Files and runs: models, feeds, sessions."""
