"""Augmentation: TorchIO transforms and what it lacks."""
