"""Instance masks: annotated (polygons, RLE), predicted (28 x 28 grids), unions of superpixels."""
