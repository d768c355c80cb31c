"""Measures of generated samples: distances and manifolds in feature space, and classifiers."""
