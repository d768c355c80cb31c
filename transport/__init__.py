"""Rectified flow: straight paths from noise to data, and the solvers that follow them."""
