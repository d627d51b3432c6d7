"""The Ray engine: simulated silos over the CPUs and GPUs of one cluster. See `engine`."""
