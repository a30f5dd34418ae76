"""The quarantine as a queue that people work: what could not be billed is explained, then released, attributed to an
account, or discarded with a reason.

    rules           for every Reason: what it means, and what a release does or why there is none
    reading         an item's payload, for people
    mending         what a person decides about an item, as a change of its payload; who it was before
    metered         what a file of meters made usage, read again with such a file
    items           the queue and the trail of what was done: read
    rereading       what an item comes to as usage when it is read again
    settling        some items in one transaction: their points and the notes of who did it, or nothing
    contradictions  what is stored that an item contradicts, and which billing period it would change

A release goes the way of every request: decoded, validated, written by `store.writer`. What was sent keeps its identity
where nothing of it was changed, so it may come again later; what was changed gets an identity made of what was sent.
"""
