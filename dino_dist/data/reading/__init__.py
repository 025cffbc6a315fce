"""From a sample id to pixels: bytes from a disk, a store or its copy on this node, decoded."""
