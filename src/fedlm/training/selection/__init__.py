"""Which rows a silo trains on: one file per method, over encoded rows and a model, without any state."""
