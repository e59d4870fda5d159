"""Feature networks, distances between image sets, reconstruction metrics."""
