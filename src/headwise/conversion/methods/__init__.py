"""Another attention for each layer: merged heads, latents, and latents expanded again."""
