"""Example-level differential privacy in a silo's local training: DP-SGD (Abadi et al., CCS 2016)."""
