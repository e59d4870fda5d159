"""The latent cache, and the foundations that every other package shares."""
