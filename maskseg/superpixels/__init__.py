"""From pixels to segments without a network."""
