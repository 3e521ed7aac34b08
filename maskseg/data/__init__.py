"""COCO files and synthetic scenes -> batches."""
