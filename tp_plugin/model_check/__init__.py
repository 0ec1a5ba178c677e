"""A small copy of a model, run sharded and unsharded, and compared; the table of every architecture."""
