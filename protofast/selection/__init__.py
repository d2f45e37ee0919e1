"""Placeholder."""
Selection = farthest_pair = k_center = k_dispersion = k_medoids = None
