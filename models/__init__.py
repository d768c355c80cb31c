"""The DiT backbone and its feed-forward layers."""
