"""Pure tensor functions: boxes, matching, NMS, RoIAlign, pasting, run lengths, losses."""
