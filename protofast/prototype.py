"""Placeholder."""
PrototypeActivation = PrototypeDistance = prototype_activation = prototype_distance = prototype_map = None
