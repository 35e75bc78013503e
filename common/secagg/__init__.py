"""Secure aggregation, the arithmetic: values and functions without I/O, clock or state.

    ring      fixed point in Z_2^32 or Z_2^64, mask expansion, check words
    shamir    secrets shared over the field of 2^256 - 189
    keys      X25519, HKDF, sealed shares
    masks     which key is derived from what
    commit    what a dealer signs about its shares, and the path that proves one receiver's
    wire      contexts and messages as canonical bytes
    cohort    whom a node counts, thresholds, and the checks of every list that a server names

`client.secagg` and `server.secagg` are the two halves that use them; docs/secure-aggregation.md is
the protocol.
"""
