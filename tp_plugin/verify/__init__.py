"""Proof: a scaled-down copy of a model, run sharded and unsharded, and compared."""
