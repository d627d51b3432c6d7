"""fedlm lets organisations that may not share their text train, align and use one language model together."""

__version__ = "0.1.0"
