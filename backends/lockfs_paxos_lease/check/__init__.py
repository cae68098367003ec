"""What is wrong with lease areas: pure, the bytes of areas in, findings out.

    finding     one thing that is wrong, and how bad that is
    area        what an area is: lockspace, lease, index, or nothing known
    lockspace   the records of hosts
    lease       leader, request, and the blocks of hosts
    index       the index of a volume

What no checksum covers is held against everything that it must agree with.  What cannot be told even so is listed in
the documentation of leases.
"""
