"""Data sets that are made on first use."""
