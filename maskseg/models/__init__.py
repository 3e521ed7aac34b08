"""The Mask R-CNN stages, one concept per file."""
