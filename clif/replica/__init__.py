"""What a rank runs: the engine that serves and learns, and the worker around it."""
