"""Files of a run's folder: atomic, private, locked, and patient with a full disk. Free of torch."""
