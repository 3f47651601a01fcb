"""Methods that learn from labeled and unlabeled cases."""
