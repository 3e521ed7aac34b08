"""Training loop, distributed context, checkpoints and logs."""
