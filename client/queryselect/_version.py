"""The version of QuerySelect: of the client, the service and the wheel."""

__version__ = "0.1.0"
