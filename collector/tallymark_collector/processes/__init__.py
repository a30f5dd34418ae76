"""Several processes at the same ports: a parent that looks after what is stored, and children that take requests.

    ports     holds the ports, so that only the parent's own children share them
    workers   starts children, starts again those that die, ends them all
    parent    the parent's way from start to end

Children are programs of their own (exec, not fork): nothing of gRPC's is ever copied. The parent has no server of
gRPC's, runs the loops that one collector has to run, and keeps the ports while children come and go.
"""
