"""The hash layer: binary codes that merge superpixels into segments."""
