"""The run's folder, with its journal, checkpoints and blobs."""
