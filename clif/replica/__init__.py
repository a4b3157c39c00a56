"""One replica, built from the configuration."""
