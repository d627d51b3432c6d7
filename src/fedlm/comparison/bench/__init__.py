"""Every algorithm on the same work: one table of quality, aggregation error, bytes, memory and seconds."""
