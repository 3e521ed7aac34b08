"""COCO JSON files: parsing, checks and the report."""
