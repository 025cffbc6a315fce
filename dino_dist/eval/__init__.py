"""What a checkpoint is worth: features, and what classifiers, retrieval, copies and videos make of them."""
