"""What the gate knows of gRPC and of the inference protocol (KServe v2, Triton): statuses, deadlines, methods.

Does no I/O, reads no clock and knows nothing of HTTP/2 frames: it takes names and values of fields as bytes.
"""
