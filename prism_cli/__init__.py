"""The doors: one click command per file."""
