"""What is spoken with clients: gRPC over HTTP/2. The dataplane behind it knows nothing of protocols."""
