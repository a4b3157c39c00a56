"""What must not be lost, and how a start takes it over. Free of torch."""
