"""Metrics: one HDF5 file per process while a run goes on, merged into RUN/run.h5, summed up in RUN/summary.json."""
