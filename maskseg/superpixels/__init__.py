"""Superpixel methods: segmentation of an image into small regions without a network."""
