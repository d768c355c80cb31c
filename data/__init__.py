"""Images, VAE, cached latents and the order in which training sees them."""
