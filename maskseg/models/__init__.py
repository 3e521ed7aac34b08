"""The Mask R-CNN stages, one concept a file."""
