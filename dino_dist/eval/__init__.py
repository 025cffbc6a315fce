"""What a checkpoint is worth: features, nearest neighbours, attention maps."""
