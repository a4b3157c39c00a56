"""Training jobs that arrive while a run goes on: records, the store, and which job trains next. Free of torch."""
