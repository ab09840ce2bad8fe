"""The client of QuerySelect, which selects the unlabelled items that people should label next.

`Client` talks to a server, or with `Client("local:")` runs the same service in this process;
the strategy messages (`Margin`, `KCenterGreedy` …) and their enum values are the proto's own.
"""

from queryselect._client import Client, Inputs, Job, Options
from queryselect._errors import (
    Aborted,
    Busy,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    PermissionDenied,
    QuerySelectError,
    ServerBug,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from queryselect._picks import Info, Picks
from queryselect._session import Session
from queryselect._version import __version__
from queryselect.strategies.v1 import *  # noqa: F403  # its __all__ is generated
from queryselect.strategies.v1 import __all__ as _strategies
from queryselect.v1.tensor_pb2 import (
    TENSOR_FORMAT_ARROW,
    TENSOR_FORMAT_NPY,
    TENSOR_FORMAT_PARQUET,
    TENSOR_FORMAT_SAFETENSORS,
    RowRange,
    TensorRef,
)

__all__ = [  # noqa: PLE0604  # the rest is generated
    "Aborted",
    "Busy",
    "Cancelled",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "Info",
    "Inputs",
    "InvalidInput",
    "Job",
    "NotFound",
    "Options",
    "PermissionDenied",
    "Picks",
    "QuerySelectError",
    "RowRange",
    "ServerBug",
    "Session",
    "TENSOR_FORMAT_ARROW",
    "TENSOR_FORMAT_NPY",
    "TENSOR_FORMAT_PARQUET",
    "TENSOR_FORMAT_SAFETENSORS",
    "TensorRef",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
    "__version__",
    *_strategies,
]
