"""What keeps updates from telling of a silo or a row: secure aggregation (`secagg`), and differential privacy: what a
mechanism costs, how much noise a budget needs, the noise itself, and the ledger.

Nothing is imported here: the accountants take seconds to load, and most commands need none of them.
"""
