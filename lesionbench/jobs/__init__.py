"""The top floor: what each job does with a composed configuration."""
