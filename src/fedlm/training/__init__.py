"""Local training inside a silo: tasks, packing, and one loop that a reader can follow."""
