"""Building blocks: convolutions and normalization layers."""
