"""How the parts of lockfs talk: varlink over a Unix socket, with descriptors riding along."""
