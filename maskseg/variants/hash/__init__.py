"""Hash layer: binary codes that merge superpixels into segments."""
