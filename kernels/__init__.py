# Nothing is imported here on purpose: transformers looks for a package named "kernels" on sys.path and executes it.
