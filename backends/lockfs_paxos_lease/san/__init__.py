"""Leases on a volume of a SAN: a lockspace, an index that says where each lease lies, and the leases.

    index    reading the index, and finding a place in it: pure
    volume   the volume as a place of leases

The layout is sanlock's: the lockspace first, then the index, the lease that guards it, and one area for each lease.
"""
