"""What lies on the disk: sanlock's lockspace, lease and resource-index areas, byte for byte.

Pure: bytes and numbers in, bytes and frozen records out; no I/O, no clock.  All integers are little-endian, names are
48-byte fields padded with zeros (no final zero byte is needed), and a sector is the unit of every write.

    size        the five sector and area sizes that exist
    checksum    sanlock's checksum
    version     version words of records, and how lockspaces with a timing of lockfs's own are marked
    names       the 48-byte name field
    leader      the 200-byte leader record, of delta leases (one for each host) and of paxos leases alike
    delta       a host's sector in the lockspace: leader and bitmap
    dblock      a host's sector in a lease: ballot block and mode block
    request     a lease's request sector
    rindex      the index of leases on a volume
    fresh       new areas, in the order of writes that survives a crash
    scan        which sectors of an area are used, or differ from an earlier look

Decoding never fails but for too few bytes; whether a record is good is asked separately, by its ``validate``, which
raises `errors.BadRecord` with the code that sanlock gives, for the first check that fails in sanlock's order.
"""
