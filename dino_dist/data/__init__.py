"""The way of an image: tar shard, index, global order, decoded bytes, crops on the device."""
