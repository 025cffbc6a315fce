"""A run as one self-contained HTML page, from the files of its folder alone; nothing here needs torch or a network."""
