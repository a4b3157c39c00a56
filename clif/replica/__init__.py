"""One replica, put together from the configuration."""
