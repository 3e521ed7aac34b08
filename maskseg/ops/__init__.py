"""Pure functions of tensors and arrays: boxes, matching, NMS, RoIAlign, pasting, RLE, losses."""
