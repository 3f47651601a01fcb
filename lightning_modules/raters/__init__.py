"""Several raters per case: what a network learns from them, and how their labels are fused."""
