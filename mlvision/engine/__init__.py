"""The training loop and what it stands on: precision, optimizer, checkpoints, logs, evaluation."""
