"""What is kept: the run's folder with its journal, checkpoints and blobs."""
