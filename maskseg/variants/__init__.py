"""Other stages for the same slots; the core never imports these."""
