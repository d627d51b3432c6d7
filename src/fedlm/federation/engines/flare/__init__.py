"""Silos in organisations of their own: NVFlare carries bytes under mutual TLS between relays, and nothing else."""
