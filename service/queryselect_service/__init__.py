"""The QuerySelect server: kernels, their registry, and the gRPC service around them."""
