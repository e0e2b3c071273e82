"""Adapter files, merged models, and the proofs that they are what was trained."""
