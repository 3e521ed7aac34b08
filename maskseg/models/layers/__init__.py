"""Building blocks: convolutions with their norms."""
