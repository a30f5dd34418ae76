"""Several processes at the same ports: a parent that looks after what is stored, and children that take requests.

    ports     holds the ports, so that only the parent's own children share them
    workers   starts children, starts again those that die, ends them all
    parent    the parent's way from start to end

and what any process that takes requests asks of the interpreter and the system:

    collecting   how often it searches for garbage
    descriptors  how many files it may open, and so how many connections there may be

Children are programs of their own (exec, not fork): nothing of gRPC's is ever copied. The parent has no server of
gRPC's, runs the loops that one collector has to run, and keeps the ports while children come and go.
"""
