"""What the service itself can take: transport, load, faults."""
