"""Convolutional feature masking: joint object and stuff segmentation."""
