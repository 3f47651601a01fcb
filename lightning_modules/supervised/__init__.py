"""Methods that learn from labeled cases alone."""
