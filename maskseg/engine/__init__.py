"""The training loop, checkpoints, logs."""
