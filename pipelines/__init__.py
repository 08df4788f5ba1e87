"""From bytes on disk to batches, and from a recipe to a finished run."""
