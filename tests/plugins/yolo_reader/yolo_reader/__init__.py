"""Datasets in the YOLO format for segmentation."""

from yolo_reader.source import YoloSource

__all__ = ["YoloSource"]
