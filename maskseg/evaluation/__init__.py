"""Outputs -> COCO rows -> AP."""
