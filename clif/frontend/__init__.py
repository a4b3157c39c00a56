"""The HTTP front end: clients' requests become the control process's, in a process of its own. Free of torch."""
