"""One network wherever it lies, under this project's names: our checkpoints, and files of others."""
