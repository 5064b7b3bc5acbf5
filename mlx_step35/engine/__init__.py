"""One thread that owns every array: token ids in, events out."""
