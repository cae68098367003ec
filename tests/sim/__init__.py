"""A deterministic simulator of `paxos-lease`: the production engine of many hosts on virtual disks, in virtual time.

`run --seeds N` runs seeds; a failing one prints how to replay it.

    world      virtual time, events, the driver of operations, and what the storage does to each I/O
    geometry   areas no larger than what is written in them
    station    a lockfs host: lockd (the engine), its VMs, and what befalls it
    reference  a sanlock host, from the description of its algorithms, sharing nothing with the engine
    checker    sees every write that lands and every write of a VM, and says who was allowed
    scenario   one seed: what kind of cluster, what faults, for how long
    claims     another kind of seed: many hosts that want one host id
    mutants    deliberate bugs, which the checker must catch
    bench      one operation at a time on areas in memory, for unit tests
"""
