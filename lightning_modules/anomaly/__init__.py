"""Lesions as what a model of healthy brains, or a threshold, does not explain."""
