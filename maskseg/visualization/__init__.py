"""Images and plots of data, detections and metrics."""
