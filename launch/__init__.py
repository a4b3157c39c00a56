"""Entry points that start ranks; installed as clif.launch and started by path."""
