"""``lockfs lease``: look at leases on the storage, check, mend and make them.  Needs no daemon.

    lease      the command line
    places     files, directories and devices, and the areas in them
    describe   areas as plain data, which is the JSON form
    text       the same for people
    survey     all areas of a lockspace, checked against each other
    mend       what can be mended without any doubt
    make       new lockspaces and leases

Everything here reads past the page cache, since another host may have written.
"""
