"""What is done with trained networks: ensembles, missing modalities, attacks, thresholds chosen out of fold."""
