"""Masks of objects: annotated (polygons, run lengths), predicted (28 x 28 grids), unions of superpixels."""
