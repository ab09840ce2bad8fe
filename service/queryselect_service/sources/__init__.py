"""Tensors that requests name by address instead of sending them: which may be read, and how they come.

address.py      what an address says, and the operator's allow-list
fetch.py        from a request's references to the parts of an upload
file.py  s3.py  gs.py  https.py        one file per scheme: an address -> an object of which ranges can be read
npy.py  safetensors.py  columns.py     one file per kind of format: an object -> a tensor's type, shape and pieces
"""
