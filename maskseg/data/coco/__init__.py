"""COCO JSON files: reading, checks, the report."""
