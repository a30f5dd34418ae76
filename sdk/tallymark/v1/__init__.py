"""Messages and stubs of the collector's own gRPC services, made from proto/tallymark/v1 (`make proto`).

    from tallymark.v1 import usage_pb2, usage_pb2_grpc

`usage`, `access` and `quarantine`: see docs/api.md. Nothing else of the SDK imports them.
"""
