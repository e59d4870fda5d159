"""Generators over normalised latents, one file a model, and what they share."""
