"""Whether federating helped: federated against each silo alone and all data in one place (`triple.compare`)."""
