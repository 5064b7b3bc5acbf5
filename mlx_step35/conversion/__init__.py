"""From the original release to a converted checkpoint, one slice at a time.

`source` finds the tensors, `plan` decides what becomes of each, `transform` turns a slice into output bytes,
`stream` writes shards and `journal` remembers what is done; `verify`, `card` and `hub` prove and publish it.
"""
