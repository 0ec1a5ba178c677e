"""Stands for torchaudio, which has no build for a CPU torch: LLaMA-Factory imports it, and texts need nothing of it."""
