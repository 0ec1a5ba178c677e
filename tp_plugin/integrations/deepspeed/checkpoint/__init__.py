"""Checkpoints of an engine, in a format that any (tp, dp, ZeRO stage) resumes."""
