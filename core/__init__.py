"""Small shared ground: types that travel between folders, randomness, processes, logging."""
