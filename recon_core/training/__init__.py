"""Training: a resumable loop, checkpoints without pickles, losses. What is trained lives with its method."""
