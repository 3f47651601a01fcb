"""A Hydra plugin (Hydra finds plugins by the folder's name): searches with Optuna."""
